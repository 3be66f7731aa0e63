//! Alternating rounds, and the median and spread of what they give.

use std::{
    fs,
    time::{Duration, Instant},
};

use rustix::time::{ClockId, clock_gettime};

/// The first rounds are not counted.
pub const WARM_UP: usize = 2;

/// Sends so many requests.
pub type Case<'a> = (String, Box<dyn FnMut(u64) + 'a>);

/// The CPU time of this process so far, all threads, in nanoseconds. Unlike the time on the wall it stands still while other
/// processes have the core.
pub fn cpu() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let time: Duration = time.try_into().expect("it is not negative");
    time.as_nanos() as f64
}

/// How long the main thread waited for a core, as a part of the time it ran.
pub fn busy() -> f64 {
    let stat = fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    let mut fields = stat.split_whitespace().map(|field| field.parse::<f64>());
    match (fields.next(), fields.next()) {
        (Some(Ok(ran)), Some(Ok(waited))) => waited / ran,
        _ => 0.0,
    }
}

/// Runs the cases in turns of `count` requests, and takes the time of a request of each turn.
pub fn alternate(cases: &mut [Case<'_>], count: u64, rounds: usize) -> Times {
    let mut times = Times::default();
    for round in 0..WARM_UP + rounds {
        for (name, send) in &mut *cases {
            let (since, cpu_before) = (Instant::now(), cpu());
            send(count);
            let (cpu, wall) = (cpu() - cpu_before, since.elapsed());
            if round >= WARM_UP {
                times.cpu.add(name, cpu / count as f64);
                times.wall.add(name, wall.as_nanos() as f64 / count as f64);
            }
        }
    }
    times
}

/// By both clocks, in nanoseconds.
#[derive(Default)]
pub struct Times {
    pub cpu: Rounds,
    pub wall: Rounds,
}

/// What each round gave, by name.
#[derive(Default)]
pub struct Rounds(Vec<(String, Vec<f64>)>);

impl Rounds {
    pub fn add(&mut self, name: &str, value: f64) {
        match self.0.iter_mut().find(|(of, _)| of == name) {
            Some((_, values)) => values.push(value),
            None => self.0.push((name.to_owned(), vec![value])),
        }
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    pub fn contains(&self, name: &str) -> bool {
        self.names().any(|of| of == name)
    }

    /// Over all rounds: what comes once in many requests counts, which a median leaves out.
    pub fn mean(&self, name: &str) -> f64 {
        let of = self.0.iter().find(|(of, _)| of == name);
        let (_, values) = of.unwrap_or_else(|| panic!("no case is named {name}"));
        values.iter().sum::<f64>() / values.len() as f64
    }

    pub fn spread(&self, name: &str) -> Spread {
        self.each(|of| of(name))
    }

    /// The spread of a formula that is computed for each round: what else the machine does changes between rounds.
    pub fn each(&self, formula: impl Fn(&dyn Fn(&str) -> f64) -> f64) -> Spread {
        let rounds = self.0.first().map_or(0, |(_, values)| values.len());
        let values = (0..rounds).map(|round| {
            formula(&|name| {
                let of = self.0.iter().find(|(of, _)| of == name);
                let (_, values) = of.unwrap_or_else(|| panic!("no case is named {name}"));
                values[round]
            })
        });
        Spread::of(values.collect())
    }
}

/// A median, and the quarters below and above it.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    pub low: f64,
    pub median: f64,
    pub high: f64,
}

impl Spread {
    pub fn of(mut values: Vec<f64>) -> Self {
        assert!(!values.is_empty(), "a round was measured");
        values.sort_by(f64::total_cmp);
        let last = values.len() - 1;
        Self {
            low: values[last / 4],
            median: values[last / 2],
            high: values[last - last / 4],
        }
    }

    /// Of a figure that was taken once.
    pub fn once(value: f64) -> Self {
        Self::of(vec![value])
    }

    pub fn scaled(self, by: f64) -> Self {
        Self {
            low: self.low * by,
            median: self.median * by,
            high: self.high * by,
        }
    }
}
