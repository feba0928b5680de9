//! A console: text that leaves, and bytes that come in when somebody types them.
//!
//! What comes in is a stream of bytes, in buffers of any length; nobody can tell where one piece of it begins.

use super::CheckAbort;

/// Room for what comes in, bytes.
pub(super) const BUFFER_BYTES: u32 = 256;
/// Digits, each byte the next of the last.
const DIGITS: u64 = 10;

/// Text `number` that leaves: some consoles take nothing else.
pub(super) fn packet(number: u64) -> Vec<u8> {
    let len = 20 + number * 131 % 1000;
    let digits = (0..len).map(|at| digit(number + at));
    digits.chain([b'\n']).collect()
}

/// What is typed to fill `buffers` buffers.
pub(super) fn input(number: u64, buffers: u64) -> Vec<u8> {
    (0..buffers * u64::from(BUFFER_BYTES)).map(|at| digit(number + at)).collect()
}

fn digit(number: u64) -> u8 {
    b'0' + (number % DIGITS) as u8
}

/// Checks what came in; true if it was typed here.
pub(super) fn received(bytes: &[u8]) -> Result<bool, CheckAbort> {
    if bytes.is_empty() {
        return Err(CheckAbort::Violation("a buffer was used for nothing".into()));
    }
    Ok(bytes.iter().all(u8::is_ascii_digit))
}
