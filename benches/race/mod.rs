//! Contenders side by side: they take turns in one run, medians are compared, ratios are printed.
//!
//! Nothing here knows what is measured. Each contender prepares, measures its own part and returns nanoseconds.

/// One contender: its name, and a turn that returns nanoseconds for one unit of work.
pub(crate) type Contender<'a> = (&'a str, Box<dyn FnMut() -> f64 + 'a>);

/// Repetitions of a contender's work within a turn. The fastest counts: it meets the contender's own caches, and
/// no other process in between.
const REPEATS: usize = 7;

/// Lets every contender take `turns` turns, one after the other, and prints the medians beside the first one's.
pub(crate) fn race(title: &str, turns: usize, mut contenders: Vec<Contender<'_>>) {
    let mut times = vec![Vec::new(); contenders.len()];
    for turn in 0..=turns {
        for ((_, run), times) in contenders.iter_mut().zip(&mut times) {
            let time = (0..REPEATS).map(|_| run()).fold(f64::INFINITY, f64::min);
            // The first turn warms up.
            if turn > 0 {
                times.push(time);
            }
        }
    }
    let medians: Vec<f64> = times.iter_mut().map(|times| median(times)).collect();
    println!("{title}");
    for ((name, _), median) in contenders.iter().zip(&medians) {
        println!("  {name:<34} {:>12}  {:>7.2}x", show(*median), median / medians[0]);
    }
}

/// Nanoseconds that `work` takes.
pub(crate) fn time<T>(work: impl FnOnce() -> T) -> f64 {
    let start = std::time::Instant::now();
    std::hint::black_box(work());
    start.elapsed().as_nanos() as f64
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn show(nanoseconds: f64) -> String {
    match nanoseconds {
        ns if ns < 1e4 => format!("{ns:.2} ns"),
        ns => format!("{:.1} us", ns / 1e3),
    }
}
