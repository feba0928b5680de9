//! Consoles: output of the guest, and input typed at the host.
//!
//! Input is a byte stream in buffers of any length, without message boundaries.

use crate::check::outcome::CheckAbort;

/// Size of an input buffer, bytes.
pub(in crate::check) const BUFFER_BYTES: u32 = 256;
/// Input consists of consecutive digits.
const DIGITS: u64 = 10;

/// Returns output `number`. It is text, because some consoles accept nothing else.
pub(in crate::check) fn packet(number: u64) -> Vec<u8> {
    let len = 20 + number * 131 % 1000;
    let digits = (0..len).map(|at| digit(number + at));
    digits.chain([b'\n']).collect()
}

/// Returns input that fills `buffers` buffers.
pub(in crate::check) fn input(number: u64, buffers: u64) -> Vec<u8> {
    (0..buffers * u64::from(BUFFER_BYTES)).map(|at| digit(number + at)).collect()
}

fn digit(number: u64) -> u8 {
    b'0' + (number % DIGITS) as u8
}

/// Checks input that arrived. Returns true if it was sent by this module.
pub(in crate::check) fn received(bytes: &[u8]) -> Result<bool, CheckAbort> {
    if bytes.is_empty() {
        return Err(CheckAbort::Violation("an empty buffer was returned".into()));
    }
    Ok(bytes.iter().all(u8::is_ascii_digit))
}
