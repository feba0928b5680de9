//! Network interfaces: frames and packets.

use crate::check::outcome::CheckAbort;
use crate::check::pages::noise;

/// Size of the header before every packet with VERSION_1.
pub(in crate::check) const HEADER: usize = 12;
/// Maximum frame size without a larger MTU.
pub(in crate::check) const MAX_FRAME_BYTES: usize = 1514;
/// Size of Ethernet, IP and UDP headers. The tag of our frames follows them, whatever the source.
const HEADERS: usize = 42;
const TAG: u64 = 0x6b63_6568_632d_6d76;
/// An Ethernet type for experiments (IEEE 802).
const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];

/// Returns the payload of frame `number`, of maximum or of varying length.
pub(in crate::check) fn payload(number: u64, long: bool) -> Vec<u8> {
    let most = MAX_FRAME_BYTES - HEADERS;
    let len = if long { most } else { 40 + (number * 131) as usize % (most - 40) };
    let rest = noise(number, (len - 16) as u32);
    [&TAG.to_le_bytes(), &number.to_le_bytes(), rest.as_slice()].concat()
}

/// Builds a frame.
pub(in crate::check) fn frame(payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 0x77]);
    frame.extend(ETHER_TYPE);
    frame.resize(HEADERS, 0);
    frame.extend(payload);
    frame
}

/// Builds a packet: virtio-net header and frame.
pub(in crate::check) fn packet(payload: &[u8]) -> Vec<u8> {
    [&[0; HEADER], frame(payload).as_slice()].concat()
}

/// Checks a received packet. Returns true if it is one of ours; its contents must then be intact.
pub(in crate::check) fn received(packet: &[u8]) -> Result<bool, CheckAbort> {
    if packet.len() < HEADER {
        return Err(CheckAbort::Violation(format!("a packet of {} bytes came in", packet.len())));
    }
    let Some(ours) = packet.get(HEADER + HEADERS..).filter(|rest| rest.starts_with(&TAG.to_le_bytes())) else {
        return Ok(false);
    };
    let number = ours.get(8..16).and_then(|bytes| Some(u64::from_le_bytes(bytes.try_into().ok()?)));
    let rest = ours.get(16..).unwrap_or_default();
    match number.is_some_and(|number| noise(number, rest.len() as u32) == rest) {
        true => Ok(true),
        false => Err(CheckAbort::Violation("a frame was damaged".into())),
    }
}
