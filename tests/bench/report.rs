//! What a run found: a table on the terminal, `results/results.json`, and charts.

use std::{fmt::Write as _, fs, path::Path, process::Command};

use serde_json::{Value, json};

use crate::measure::Spread;

#[derive(Default)]
pub struct Report {
    group: &'static str,
    figures: Vec<Figure>,
}

struct Figure {
    group: &'static str,
    name: String,
    unit: &'static str,
    value: Spread,
    limit: Option<Limit>,
}

/// What the project has set itself.
#[derive(Clone, Copy)]
pub enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

impl Limit {
    fn holds(self, value: f64) -> bool {
        match self {
            Self::AtMost(limit) => value <= limit,
            Self::AtLeast(limit) => value >= limit,
        }
    }

    /// How much of it is used, in per cent: above 100 it does not hold.
    fn used(self, value: f64) -> f64 {
        match self {
            Self::AtMost(limit) => value / limit * 100.0,
            Self::AtLeast(limit) => limit / value * 100.0,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtMost(limit) => format!("≤ {limit}"),
            Self::AtLeast(limit) => format!("≥ {limit}"),
        }
    }
}

impl Report {
    /// Begins a group of rows.
    pub fn group(&mut self, group: &'static str) {
        self.group = group;
        println!("\n{group}");
    }

    pub fn row(&mut self, name: &str, unit: &'static str, value: Spread) {
        self.limited(name, unit, value, None);
    }

    pub fn limited(&mut self, name: &str, unit: &'static str, value: Spread, limit: Option<Limit>) {
        let figure = Figure {
            group: self.group,
            name: name.to_owned(),
            unit,
            value,
            limit,
        };
        println!("  {}", figure.line());
        self.figures.push(figure);
    }

    /// The limits once more, together.
    pub fn print_limits(&self) {
        if self.limited_figures().next().is_none() {
            return;
        }
        println!("\nlimits");
        for figure in self.limited_figures() {
            println!("  {:20} {}", figure.group, figure.line());
        }
    }

    /// Writes the figures and the charts of all parts.
    pub fn write(&self, machine: &Machine) {
        self.write_figures("results.json", machine);
        write("added.svg", &self.added());
        write("limits.svg", &self.limits());
        write("records.svg", &self.records());
        write("waiters.svg", &self.waiters());
    }

    /// Writes the figures alone, to this file in `results/`.
    pub fn write_figures(&self, file: &str, machine: &Machine) {
        let figures: Vec<Value> = self.figures.iter().map(Figure::json).collect();
        let json = json!({ "machine": machine.json(), "figures": figures });
        write(file, &format!("{json:#}\n"));
    }

    fn limited_figures(&self) -> impl Iterator<Item = &Figure> {
        let figures = self.figures.iter();
        figures.filter(|figure| figure.limit.is_some())
    }

    fn of<'a>(&'a self, group: &'a str, prefix: &'a str) -> impl Iterator<Item = &'a Figure> {
        let figures = self.figures.iter();
        figures.filter(move |figure| figure.group == group && figure.name.starts_with(prefix))
    }

    fn added(&self) -> String {
        let floors = self.of("256 B", "floor");
        let added = floors.chain(self.of("256 B", "added by "));
        let bars = added.map(|figure| {
            let name = figure.name.trim_start_matches("added by ");
            (name.to_owned(), figure.value.scaled(1e-3))
        });
        let title = "CPU time over bare axum, 256 B, in memory (µs)";
        bars_chart(title, &bars.collect::<Vec<_>>(), None)
    }

    fn limits(&self) -> String {
        let bars = self.limited_figures().filter_map(|figure| {
            let limit = figure.limit?;
            let name = format!("{}: {} {}", figure.group, figure.name, limit.text());
            let [low, median, high] =
                [figure.value.low, figure.value.median, figure.value.high].map(|v| limit.used(v));
            let (low, high) = (low.min(high), low.max(high));
            Some((name, Spread { low, median, high }))
        });
        let title = "How much of each limit is used (%)";
        bars_chart(title, &bars.collect::<Vec<_>>(), Some(100.0))
    }

    fn records(&self) -> String {
        let figures = self.of("records", "first / floor");
        let bars = figures.map(|figure| (figure.name.clone(), figure.value));
        let title = "First execution over the floor, by records held (×)";
        bars_chart(title, &bars.collect::<Vec<_>>(), None)
    }

    fn waiters(&self) -> String {
        let figures = self.of("waiters", "CPU of each");
        let bars = figures.map(|figure| (figure.name.clone(), figure.value));
        let title = "CPU time of each request that waits for one key (µs)";
        bars_chart(title, &bars.collect::<Vec<_>>(), Some(12.0))
    }
}

fn write(file: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("results")
        .join(file);
    fs::write(&path, text).expect("results/ can be written");
    println!("written: {}", path.display());
}

impl Figure {
    fn line(&self) -> String {
        let Spread { low, median, high } = self.value;
        let value = format!("{} {}", number(median), self.unit);
        let mut line = format!("{:42} {value:>12}", self.name);
        if low < high {
            let _ = write!(line, "  ({} to {})", number(low), number(high));
        }
        if let Some(limit) = self.limit {
            let word = if limit.holds(median) {
                "holds"
            } else {
                "DOES NOT HOLD"
            };
            let _ = write!(line, "  limit {}: {word}", limit.text());
        }
        line
    }

    fn json(&self) -> Value {
        let Spread { low, median, high } = self.value;
        let mut json = json!({
            "group": self.group, "name": self.name, "unit": self.unit,
            "median": rounded(median), "quarter_below": rounded(low), "quarter_above": rounded(high),
        });
        if let Some(limit) = self.limit {
            json["limit"] = match limit {
                Limit::AtMost(limit) => json!({ "at_most": limit }),
                Limit::AtLeast(limit) => json!({ "at_least": limit }),
            };
            json["holds"] = limit.holds(median).into();
        }
        json
    }
}

/// Three digits, or all before the point.
fn number(value: f64) -> String {
    match value.abs() {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// What the figures depend on besides the code.
pub struct Machine {
    waited: f64,
}

impl Machine {
    /// `waited` is how long the process waited for a core, as a part of the time it ran.
    pub fn of_this_run(waited: f64) -> Self {
        Self { waited }
    }

    fn json(&self) -> Value {
        let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpus.lines().find(|line| line.starts_with("model name"));
        let model = model.and_then(|line| line.split(": ").nth(1));
        let rustc = Command::new("rustc").arg("--version").output();
        let rustc = rustc.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        json!({
            "cpu": model,
            "cores": std::thread::available_parallelism().map_or(0, usize::from),
            "rustc": rustc.ok(),
            "waited_for_a_core": rounded(self.waited),
            // A quiet machine keeps a process waiting for less than a hundredth of its time.
            "shared_with_other_work": self.waited > 0.01,
        })
    }
}

/// Horizontal bars, each with its spread, and a line at the mark.
fn bars_chart(title: &str, bars: &[(String, Spread)], mark: Option<f64>) -> String {
    const LABELS: f64 = 330.0;
    const WIDTH: f64 = 380.0;
    const ROW: f64 = 24.0;
    const TOP: f64 = 40.0;

    let highs = bars.iter().map(|(_, value)| value.high);
    let longest = highs.chain(mark).fold(f64::MIN_POSITIVE, f64::max);
    // A bar far beyond the mark is cut, or the others could not be told apart; its number stands beside it.
    let longest = mark.map_or(longest, |mark| longest.min(2.0 * mark));
    let x = |value: f64| LABELS + value.clamp(0.0, longest) / longest * WIDTH;
    let bottom = TOP + ROW * bars.len() as f64;
    let (width, height) = (LABELS + WIDTH + 70.0, bottom + 12.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"12\" y=\"24\" font-size=\"15\">{title}</text>\n"
    );
    for (nth, (name, value)) in bars.iter().enumerate() {
        let y = TOP + ROW * nth as f64;
        let middle = y + ROW / 2.0;
        let colour = match mark {
            Some(mark) if value.median > mark => "#c0504d",
            _ => "#4f81bd",
        };
        let (length, low, high) = (x(value.median) - LABELS, x(value.low), x(value.high));
        let (text_y, text_x) = (middle + 4.0, high + 6.0);
        let end = LABELS - 8.0;
        let bar_y = y + 5.0;
        let name = name.replace('&', "&amp;").replace('<', "&lt;");
        let _ = write!(
            svg,
            "<text x=\"{end}\" y=\"{text_y}\" text-anchor=\"end\">{name}</text>\n\
             <rect x=\"{LABELS}\" y=\"{bar_y}\" width=\"{length:.1}\" height=\"14\" fill=\"{colour}\"/>\n\
             <path d=\"M{low:.1} {middle}H{high:.1}\" stroke=\"black\"/>\n\
             <text x=\"{text_x:.1}\" y=\"{text_y}\">{}</text>\n",
            number(value.median)
        );
    }
    if let Some(mark) = mark {
        let x = x(mark);
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} {TOP}V{bottom}\" stroke=\"black\" stroke-dasharray=\"4 3\"/>"
        );
    }
    svg.push_str("</svg>\n");
    svg
}
