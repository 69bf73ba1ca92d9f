//! What a benchmark prints: a table for the eyes and for `tests/benches/runs/`.

use std::error::Error;
use std::time::Duration;

pub fn head() {
    println!("| what | median | least | most |\n| --- | --- | --- | --- |");
}

/// A line of measured values, of which there must be one.
pub fn row(what: &str, mut values: Vec<f64>) -> Result<(), Box<dyn Error>> {
    values.sort_by(f64::total_cmp);
    let (Some(least), Some(most)) = (values.first(), values.last()) else {
        return Err(format!("nothing was measured of {what}").into());
    };
    let median = values[values.len() / 2];
    println!("| {what} | {median:.1} | {least:.1} | {most:.1} |");
    Ok(())
}

/// A line of one figure that does not vary.
pub fn figure(what: &str, value: u64) {
    println!("| {what} | {value} | | |");
}

pub fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
