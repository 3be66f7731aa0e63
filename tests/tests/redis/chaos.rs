//! Several processes and one Redis over a network that delays, drops and cuts.

use std::{collections::HashMap, time::Duration};

use futures_util::{StreamExt, stream};
use idempotency_axum::{Config, LockPolicy, RedisStorage};
use idempotency_tests::{
    PATIENCE,
    redis::{Chaos, Proxy, Redis},
};

use super::{Shop, assert_replays, until};

const REQUESTS: usize = 5_000;
const KEYS: usize = 500;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_requests_over_a_bad_network() {
    let redis = Redis::start();
    let proxy = Proxy::start(&redis);
    let mut shops = Vec::new();
    for _ in 0..3 {
        let storage = RedisStorage::connect(proxy.url()).await.unwrap();
        let storage = storage.time_limit(Duration::from_millis(300));
        let patient = |config: Config| {
            let lock = LockPolicy::default().timeout(Duration::from_millis(200));
            config.lock(lock.ttl(Duration::from_secs(10)))
        };
        shops.push(Shop::with(storage, patient, None).await);
    }
    proxy.chaos(
        20_261_124,
        Chaos {
            delayed: 50,
            dropped: 2,
            cut: 10,
        },
    );

    let requests = stream::iter(0..REQUESTS).map(|n| {
        // Each key is asked for ten times, by different processes.
        let (shop, key) = (&shops[n % 3], format!("k{}", n / 40 * 4 % KEYS + n % 4));
        async move {
            let answer = shop.order(&key).await;
            (key, answer)
        }
    });
    let answers: Vec<_> = requests.buffer_unordered(40).collect().await;
    let faults = proxy.calm();
    assert!(faults > 100, "the network was not bad: {faults}");

    let mut firsts: HashMap<String, Vec<String>> = HashMap::new();
    let mut counts: HashMap<u16, usize> = HashMap::new();
    for (key, answer) in &answers {
        *counts.entry(answer.code()).or_default() += 1;
        match answer.code() {
            201 => firsts
                .entry(key.clone())
                .or_default()
                .push(answer.text().to_owned()),
            409 => assert!(
                answer.is_replay() && answer.text().starts_with(&format!("{key} ")),
                "{answer:?}"
            ),
            423 | 503 => {}
            _ => panic!("{key}: {answer:?}"),
        }
    }
    // No lease was lost, so there is no excuse for a second execution.
    let lost: usize = shops.iter().map(|shop| shop.events.count("lost")).sum();
    assert_eq!(lost, 0, "{counts:?}");
    for (key, answers) in &firsts {
        assert_eq!(answers.len(), 1, "{key} ran twice: {answers:?}");
    }
    assert_eq!(counts.values().sum::<usize>(), REQUESTS);

    // Nothing is stuck: what is still claimed is given back or recorded, and then every key has its one answer.
    for shop in &shops {
        let drained = tokio::time::timeout(PATIENCE, shop.layer.engine().drain());
        drained.await.expect("every claim ends");
    }
    for n in 0..KEYS {
        let key = format!("k{n}");
        let answer = until(async || {
            let answer = shops[n % 3].order(&key).await;
            (answer.code() != 423 && answer.code() != 503).then_some(answer)
        });
        let answer = answer.await;
        match firsts.get(&key) {
            Some(first) => assert_replays(&answer, &first[0]),
            None => assert!([201, 409].contains(&answer.code()), "{answer:?}"),
        }
    }
    assert_eq!(
        shops.iter().map(|shop| shop.runs.count()).sum::<usize>(),
        KEYS
    );
    println!("{faults} faults; {counts:?}");
}
