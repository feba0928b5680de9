//! Counters, read as a Prometheus server does.

use std::io::{Read, Write};

/// Fetches the counters over a connection.
pub(crate) fn fetch_metrics(mut at: impl Read + Write) -> String {
    at.write_all(b"GET /metrics HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    at.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer
}

/// Returns the sum of a counter's series whose line contains `label`.
pub(crate) fn counter_value(metrics: &str, name: &str, label: &str) -> u64 {
    let lines = metrics.lines().filter(|line| line.starts_with(name) && line.contains(label));
    lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}
