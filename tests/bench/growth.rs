//! What grows: records, requests that wait for one key, cores, and the memory of records.

use std::{
    cell::Cell,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{Router, body::Body, extract::Request, routing::post};
use idempotency_axum::{Config, IdempotencyLayer, LockPolicy};
use tokio::{
    runtime::{self, Runtime},
    sync::Notify,
    task::{JoinSet, yield_now},
};

use crate::{
    apps::{Floor, Key, Load, UNLIMITED, bare, floored, memory, protected, send, weight},
    heap,
    measure::{Case, Rounds, Spread, WARM_UP, cpu},
    on_one_thread,
    report::{Limit, Report},
};

const SIZE: usize = 256;

/// First executions on storages that hold so many records and evict one for each new one, as the floor's cache does.
pub fn records(report: &mut Report) {
    const ROUNDS: u64 = 16;
    let runtime = on_one_thread();
    let weight = weight(SIZE);
    let mut bare = Load::new(bare().with_state(()), SIZE).key(Key::Fresh);
    let bare = |count| runtime.block_on(bare.send(count));
    let mut cases: Vec<(u64, Case<'_>)> = vec![(2000, ("bare".to_owned(), Box::new(bare)))];
    for exponent in 3..=6 {
        let records = 10_u64.pow(exponent);
        let max_bytes = records as usize * weight;
        let storage = memory(max_bytes);
        let mut load = Load::new(protected(storage.clone()), SIZE).key(Key::Fresh);
        let runtime = &runtime;
        let mut ours = move |count| runtime.block_on(load.send(count));
        let floor = Floor::new(max_bytes, weight);
        let (of, body) = (floor.clone(), vec![b'x'; SIZE]);
        let mut next: u64 = 0;
        let mut floored = move |count| {
            for _ in 0..count {
                of.first(&next.to_be_bytes(), &body);
                next += 1;
            }
        };
        let enough = records * 21 / 20;
        ours(enough);
        floored(enough);
        for held in [storage.records(), floor.records()] {
            let part = held as f64 / records as f64;
            assert!((0.9..=1.1).contains(&part), "{held} of {records}");
        }
        // As many insertions as there are records, in all: moka rebuilds its table once in so many.
        let count = (records / ROUNDS).max(2000);
        cases.push((count, (format!("first, 10^{exponent}"), Box::new(ours))));
        cases.push((count, (format!("floor, 10^{exponent}"), Box::new(floored))));
    }
    let mut times = Rounds::default();
    for _ in 0..ROUNDS {
        for (count, (name, send)) in &mut cases {
            let since = cpu();
            send(*count);
            times.add(name, (cpu() - since) / *count as f64);
        }
    }

    report.group("records");
    for name in times.names() {
        report.row(name, "ns", times.spread(name));
    }
    // Of means: a median would leave out the rounds in which a large table is rebuilt.
    let ratio = |exponent: u32| {
        let first = times.mean(&format!("first, 10^{exponent}")) - times.mean("bare");
        first / times.mean(&format!("floor, 10^{exponent}"))
    };
    for exponent in 3..=6 {
        let name = format!("first / floor, 10^{exponent} records");
        report.row(&name, "×", Spread::once(ratio(exponent)));
    }
    let growth = Spread::once(ratio(6) / ratio(3));
    let limit = Some(Limit::AtMost(1.15));
    report.limited("10^6 over 10^3 records", "×", growth, limit);
    let growth = times.mean("first, 10^6") / times.mean("first, 10^3");
    report.row("a request at 10^6 over 10^3", "×", Spread::once(growth));
}

/// So many duplicates wait for an operation, and get its answer when it ends.
pub fn waiters(report: &mut Report) {
    let runtime = on_one_thread();
    let crowd = Crowd::new();
    let counts = [0, 1, 10, 100, 1000, 10_000];
    let mut rounds = Rounds::default();
    for round in 0..WARM_UP + 16 {
        for count in counts {
            // Small crowds are called together more often, or a round would be a few microseconds.
            let times = (1000 / count.max(1)).clamp(1, 100);
            let took = runtime.block_on(async {
                let mut took = 0.0;
                for _ in 0..times {
                    took += crowd.wait(count).await;
                }
                took / times as f64
            });
            if round >= WARM_UP {
                rounds.add(&count.to_string(), took);
            }
        }
    }
    report.group("waiters");
    let each = |of: &dyn Fn(&str) -> f64, count: usize| {
        (of(&count.to_string()) - of("0")) / count as f64 / 1e3
    };
    for count in &counts[1..] {
        let name = format!("CPU of each of {count}");
        let limit = Some(Limit::AtMost(12.0));
        report.limited(&name, "µs", rounds.each(|of| each(of, *count)), limit);
    }
    let growth = rounds.each(|of| each(of, 10_000) / each(of, 100));
    report.row("each of 10000 over each of 100", "×", growth);
}

/// An operation that ends when it is told, and those who wait for it.
struct Crowd {
    layer: IdempotencyLayer,
    app: Router,
    end: Arc<Notify>,
    next: Cell<u64>,
}

impl Crowd {
    fn new() -> Self {
        let patient = LockPolicy::default().timeout(Duration::from_secs(60));
        let layer =
            IdempotencyLayer::enforce(memory(UNLIMITED)).config(Config::ietf().lock(patient));
        let end = Arc::new(Notify::new());
        let ends = end.clone();
        let handler = async move || {
            ends.notified().await;
            "done"
        };
        let app = Router::new().route("/orders", post(handler));
        let app = app.layer(layer.clone()).with_state(());
        Self {
            layer,
            app,
            end,
            next: 0.into(),
        }
    }

    /// The CPU time from before the first one waits until all have the answer.
    async fn wait(&self, count: usize) -> f64 {
        let engine = self.layer.engine();
        let key = self.next.replace(self.next.get() + 1);
        let request = || {
            let request = Request::post("/orders");
            let request = request.header("idempotency-key", format!("key-{key}"));
            let body = Body::from(vec![b'x'; SIZE]);
            request.body(body).expect("a valid request")
        };
        let mut requests = JoinSet::new();
        while engine.running() > 0 {
            yield_now().await;
        }
        requests.spawn(send(self.app.clone(), request()));
        while engine.running() == 0 {
            yield_now().await;
        }
        let since = cpu();
        for _ in 0..count {
            requests.spawn(send(self.app.clone(), request()));
        }
        while engine.waiting() < count {
            yield_now().await;
        }
        self.end.notify_one();
        while let Some(status) = requests.join_next().await {
            assert_eq!(status.expect("an answer"), 200);
        }
        cpu() - since
    }
}

/// First executions on a runtime of one worker, and of two: while nothing is evicted, and when each new record evicts one.
pub fn cores(report: &mut Report) {
    // Half as often without eviction, as all that is recorded stays.
    scaling(report, "cores", UNLIMITED, 20, Some(Limit::AtLeast(0.9)));
    scaling(report, "cores, evicting", 64 << 20, 40, None);
}

fn scaling(
    report: &mut Report,
    group: &'static str,
    max_bytes: usize,
    count: usize,
    limit: Option<Limit>,
) {
    let runtimes = [1, 2].map(|workers| {
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(workers)
            .enable_all()
            .build();
        (workers as u64, runtime.expect("a runtime"))
    });
    let apps = [
        ("bare", bare().with_state(())),
        ("floor", floored(Floor::new(max_bytes, weight(SIZE)))),
        ("first", protected(memory(max_bytes))),
    ];
    let mut rounds = Rounds::default();
    let mut next = 0;
    for round in 0..WARM_UP + count {
        for (workers, runtime) in &runtimes {
            for (name, app) in &apps {
                let each = if *name == "bare" { 6000 } else { 1500 };
                let (tasks, since) = (4 * workers, cpu());
                let rate = rate(runtime, tasks, app, each, &mut next);
                let cpu = (cpu() - since) / (tasks * each) as f64;
                if round >= WARM_UP {
                    rounds.add(&format!("{name}, {workers}"), rate);
                    rounds.add(&format!("CPU of {name}, {workers}"), cpu);
                }
            }
        }
    }
    report.group(group);
    for name in rounds.names() {
        let unit = if name.starts_with("CPU") { "ns" } else { "/s" };
        report.row(name, unit, rounds.spread(name));
    }
    for (name, _) in &apps {
        let scaling = rounds.each(|of| of(&format!("{name}, 2")) / of(&format!("{name}, 1")));
        report.row(&format!("{name}, 1 to 2 cores"), "×", scaling);
    }
    for (name, limit) in [("floor", None), ("first", limit)] {
        let ratio = rounds.each(|of| {
            let scaling = |name: &str| of(&format!("{name}, 2")) / of(&format!("{name}, 1"));
            scaling(name) / scaling("bare")
        });
        report.limited(&format!("scaling of {name} over bare's"), "×", ratio, limit);
    }
}

/// Requests in a second, by the clock on the wall.
fn rate(runtime: &Runtime, tasks: u64, app: &Router, each: u64, next: &mut u64) -> f64 {
    let first_key = *next;
    *next += tasks * each;
    let since = Instant::now();
    runtime.block_on(async {
        let mut set = JoinSet::new();
        for task in 0..tasks {
            let load = Load::new(app.clone(), SIZE).key(Key::Fresh);
            let mut load = load.keys_from(first_key + task * each);
            set.spawn(async move { load.send(each).await });
        }
        while let Some(done) = set.join_next().await {
            done.expect("requests without a panic");
        }
    });
    (tasks * each) as f64 / since.elapsed().as_secs_f64()
}

/// What lies on the heap for a record beside the body that it replays.
pub fn memory_of_records(report: &mut Report) {
    const RECORDS: u64 = 100_000;
    let runtime = on_one_thread();
    report.group("memory");
    for (name, size) in [("256 B", 256), ("4 KiB", 4 << 10)] {
        // What a process allocates once is there before.
        runtime.block_on(
            Load::new(protected(memory(UNLIMITED)), size)
                .key(Key::Fresh)
                .send(10),
        );
        let grown = heap::grown(|| {
            let app = protected(memory(UNLIMITED));
            let mut load = Load::new(app, size).key(Key::Fresh);
            runtime.block_on(load.send(RECORDS));
            load
        });
        let each = grown as f64 / RECORDS as f64 - size as f64;
        let name = format!("a record beside its body of {name}");
        let limit = Some(Limit::AtMost(450.0));
        report.limited(&name, "B", Spread::once(each), limit);
    }
}
