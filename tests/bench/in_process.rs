//! One process, no network, and storages that do not evict.

use bytes::Bytes;
use idempotency_axum::MemoryStorage;
use tokio::{runtime::Runtime, task::yield_now};

#[cfg(feature = "peers")]
use crate::peers;
use crate::{
    apps::{Floor, Key, Load, UNLIMITED, bare, memory, passed_through, protected, send},
    measure::{Case, Rounds, alternate},
    on_one_thread, on_two_threads,
    report::{Limit, Report},
};

const ROUNDS: usize = 30;

/// What a case adds is what it takes beyond this one, whose requests are the same.
const BASES: [(&str, &str); 10] = [
    ("exempt", "pass-through"),
    ("safe", "safe, pass-through"),
    ("first", "bare, key"),
    ("replay", "bare, same key"),
    ("mismatch", "bare, same key"),
    ("in flight", "bare, same key"),
    ("idempotent, first", "bare, key"),
    ("idempotent, replay", "bare, same key"),
    ("axum-idempotent, first", "bare, key"),
    ("axum-idempotent, replay", "bare, same key"),
];

pub fn run(report: &mut Report) {
    let runtime = on_one_thread();
    for (group, size, count) in [
        ("256 B", 256, 2000),
        ("4 KiB", 4 << 10, 1000),
        ("256 KiB", 256 << 10, 40),
    ] {
        let times = alternate(&mut cases(&runtime, size), count, ROUNDS).cpu;
        report.group(group);
        for name in times.names() {
            report.row(name, "ns", times.spread(name));
        }
        ratios(report, &times, size);
    }
    if cfg!(feature = "peers") {
        from_outside(report);
    }
}

/// From a thread that is none of the runtime's workers, as `main` is under `#[tokio::main]`: what needs another task pays for waking a
/// worker, and for being woken. Under a server, requests run on the workers.
fn from_outside(report: &mut Report) {
    let runtime = on_two_threads();
    let mut cases = cases(&runtime, 256);
    cases.retain(|(name, _)| {
        let ours = ["bare, key", "bare, same key", "first", "replay"];
        ours.contains(&name.as_str()) || name.starts_with("idempotent")
    });
    let times = alternate(&mut cases, 1000, ROUNDS).wall;
    report.group("256 B, from outside");
    for name in times.names() {
        report.row(name, "ns", times.spread(name));
    }
    over_ours(report, &times, true);
}

/// One case in a loop, with 256 B.
pub fn repeat(name: &str, count: u64) {
    let runtime = on_one_thread();
    let mut cases = cases(&runtime, 256);
    let case = cases.iter_mut().find(|(case, _)| case == name);
    let (_, send) = case.unwrap_or_else(|| panic!("no case is named {name}"));
    send(count);
}

fn ratios(report: &mut Report, times: &Rounds, size: usize) {
    // The limits are those of small requests; for larger ones the ratios are shown.
    let limited = size == 256;
    let limit = |limit| limited.then_some(limit);
    for (case, base) in BASES {
        if !times.contains(case) {
            continue;
        }
        let added = times.each(|of| of(case) - of(base));
        let limit = match case {
            "exempt" | "safe" => limit(Limit::AtMost(150.0)),
            _ => None,
        };
        report.limited(&format!("added by {case}"), "ns", added, limit);
    }
    for case in ["first", "replay", "mismatch", "in flight"] {
        let ratio = times.each(|of| (of(case) - of(base(case))) / of("floor, first"));
        let limit = match case {
            "first" => limit(Limit::AtMost(3.5)),
            "replay" => limit(Limit::AtMost(1.5)),
            _ => None,
        };
        report.limited(&format!("{case} / floor"), "×", ratio, limit);
    }
    let ratio = times.each(|of| (of("replay") - of(base("replay"))) / of("floor, replay"));
    report.row("replay / floor of a replay", "×", ratio);
    over_ours(report, times, limited);
}

/// What other libraries add, over what ours adds.
fn over_ours(report: &mut Report, times: &Rounds, limited: bool) {
    for peer in ["idempotent", "axum-idempotent"] {
        for case in ["first", "replay"] {
            let theirs = format!("{peer}, {case}");
            if !times.contains(&theirs) {
                continue;
            }
            let ratio =
                times.each(|of| (of(&theirs) - of(base(case))) / (of(case) - of(base(case))));
            let limit = (peer == "idempotent" && limited).then_some(Limit::AtLeast(10.0));
            report.limited(&format!("{theirs} / ours"), "×", ratio, limit);
        }
    }
}

fn base(case: &str) -> &'static str {
    let of = BASES.iter().find(|(of, _)| *of == case);
    of.map(|(_, base)| *base).expect("a case with a base")
}

fn cases(runtime: &Runtime, size: usize) -> Vec<Case<'_>> {
    let storage = || memory(UNLIMITED);
    let load = |app| Load::new(app, size);
    let plain = || bare().with_state(());
    let loads = [
        ("bare", load(plain())),
        ("bare, key", load(plain()).key(Key::Fresh)),
        ("bare, same key", load(plain()).key(Key::Same)),
        ("pass-through", load(passed_through()).path("/exempt")),
        ("exempt", load(protected(storage())).path("/exempt")),
        ("safe, pass-through", load(passed_through()).get()),
        ("safe", load(protected(storage())).get()),
        ("first", load(protected(storage())).key(Key::Fresh)),
        ("replay", load(protected(storage())).key(Key::Same)),
        ("mismatch", mismatched(runtime, size, storage())),
        ("in flight", in_flight(runtime, size, storage())),
    ];
    let mut cases = Vec::new();
    for (name, load) in loads {
        cases.push(case(runtime, name, load));
    }
    #[cfg(feature = "peers")]
    for (name, load) in peers::loads(runtime, size) {
        cases.push(case(runtime, name, load));
    }
    floors(&mut cases, size);
    cases
}

fn case<'a>(runtime: &'a Runtime, name: &str, mut load: Load) -> Case<'a> {
    let send = move |count| runtime.block_on(load.send(count));
    (name.to_owned(), Box::new(send))
}

/// A key that has a record of another body.
fn mismatched(runtime: &Runtime, size: usize, storage: MemoryStorage) -> Load {
    let app = protected(storage);
    runtime.block_on(Load::new(app.clone(), size).key(Key::Same).send(1));
    let other = Bytes::from(vec![b'y'; size]);
    let load = Load::new(app, size).key(Key::Same).body(other);
    load.expect(422)
}

/// A key whose operation never ends.
fn in_flight(runtime: &Runtime, size: usize, storage: MemoryStorage) -> Load {
    let app = protected(storage.clone());
    let mut load = (Load::new(app.clone(), size).path("/pending"))
        .key(Key::Same)
        .expect(409);
    runtime.block_on(async {
        tokio::spawn(send(app, load.request()));
        while storage.claims() == 0 {
            yield_now().await;
        }
    });
    load
}

/// They run without a runtime, as they wait for nothing.
fn floors(cases: &mut Vec<Case<'_>>, size: usize) {
    let body = vec![b'x'; size];
    let floor = Floor::new(UNLIMITED, 1);
    let (first, of_first) = (floor.clone(), body.clone());
    let mut next: u64 = 0;
    let first = move |count| {
        for _ in 0..count {
            first.first(&next.to_be_bytes(), &of_first);
            next += 1;
        }
    };
    cases.push(("floor, first".to_owned(), Box::new(first)));
    floor.first(b"same", &body);
    let replay = move |count| {
        for _ in 0..count {
            floor.replay(b"same", &body);
        }
    };
    cases.push(("floor, replay".to_owned(), Box::new(replay)));
}
