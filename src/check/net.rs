//! Network interfaces: frames and frame sources.
//!
//! Transmitted frames change no page except the ring's. Received frames do, so the checks of the log need a frame
//! source: the back-end itself if it sends frames back, an interface of the host, or another back-end.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt::BindToDevice};

use super::harness::{FRAMES, Harness, RequestSize, noise, wait_until};
use super::queue::DriverQueue;
use super::{CheckAbort, Target};
use crate::memory::{LOG_PAGE, Memory};
use crate::ring::Buffer;

/// Size of the header before every packet with VERSION_1.
pub(super) const HEADER: usize = 12;
/// Maximum frame size without a larger MTU.
pub(super) const MAX_FRAME_BYTES: usize = 1514;
/// Size of Ethernet, IP and UDP headers. The tag of our frames follows them, whatever the source.
const HEADERS: usize = 42;
const TAG: u64 = 0x6b63_6568_632d_6d76;
/// An Ethernet type for experiments (IEEE 802).
const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];
/// Maximum number of frames in flight towards a loopback.
const MAX_IN_FLIGHT: u64 = 32;
/// Time for a frame to return from a back-end that was not declared a loopback.
const LOOPBACK_TIMEOUT: Duration = Duration::from_secs(2);

/// Source of frames for the device under test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameSource {
    /// The device itself: it sends back what it receives.
    Loop,
    /// This interface of the host, on the other side of the device, such as a tap.
    Interface(String),
    /// Another vhost-user back-end at this socket, whose frames arrive at the device. For vsock, the host's socket,
    /// which accepts CONNECT and a port.
    Backend(PathBuf),
    /// A TCP connection to this address, for input of a console.
    Tcp(String),
}

/// An opened frame source.
pub(super) enum FrameInjector {
    /// The transmit rings of the same harness.
    Loop,
    Interface(UdpSocket),
    /// The transmit ring of a harness of its own.
    Backend(Box<Harness>),
    /// The host's socket of vsock, and its connections. They are kept open because the device may ignore one that is
    /// closed at once.
    VsockHost(PathBuf, VecDeque<UnixStream>),
    /// Input of a console.
    Tcp(TcpStream),
}

impl FrameInjector {
    /// Opens an interface of the host, for broadcasts.
    pub(super) fn interface(name: &str) -> Result<FrameInjector, CheckAbort> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        setsockopt(&socket, BindToDevice, &name.into())?;
        socket.set_broadcast(true)?;
        Ok(FrameInjector::Interface(socket))
    }
}

/// Returns the payload of frame `number`, of maximum or of varying length.
pub(super) fn payload(number: u64, long: bool) -> Vec<u8> {
    let most = MAX_FRAME_BYTES - HEADERS;
    let len = if long { most } else { 40 + (number * 131) as usize % (most - 40) };
    let rest = noise(number, (len - 16) as u32);
    [&TAG.to_le_bytes(), &number.to_le_bytes(), rest.as_slice()].concat()
}

/// Builds a frame.
pub(super) fn frame(payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 0x77]);
    frame.extend(ETHER_TYPE);
    frame.resize(HEADERS, 0);
    frame.extend(payload);
    frame
}

/// Builds a packet: virtio-net header and frame.
pub(super) fn packet(payload: &[u8]) -> Vec<u8> {
    [&[0; HEADER], frame(payload).as_slice()].concat()
}

/// Sends a packet over a transmit ring that has no other use. Returns false while the ring is full.
pub(super) fn send(queue: &mut DriverQueue, memory: &Memory, number: u64, packet: &[u8]) -> Result<bool, CheckAbort> {
    while queue.driver.pop_used()?.is_some() {}
    if u64::from(queue.driver.outstanding()) >= MAX_IN_FLIGHT {
        return Ok(false);
    }
    let gpa = FRAMES + number % (2 * MAX_IN_FLIGHT) * LOG_PAGE;
    memory.write(gpa, packet)?;
    let sent = queue.driver.add(&[Buffer { gpa, len: packet.len() as u32 }], &[], None)?.is_some();
    queue.publish();
    queue.signal_kick();
    Ok(sent)
}

/// Checks a received packet. Returns true if it is one of ours; its contents must then be intact.
pub(super) fn received(packet: &[u8]) -> Result<bool, CheckAbort> {
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

/// Returns a receive ring with one buffer.
fn receive_harness(target: &Target) -> Result<Harness, CheckAbort> {
    let mut harness = target.harness(0)?;
    harness.start()?;
    harness.add(1, RequestSize::Mixed)?;
    harness.publish();
    Ok(harness)
}

/// Waits for a frame of the frame source. A host interface also has other frames.
pub(super) fn wait_for_frame(target: &Target) -> Result<(), CheckAbort> {
    let mut harness = receive_harness(target)?;
    let deadline = harness.deadline(harness.timeout);
    harness.finish()?;
    while harness.frames_received == 0 {
        if deadline.is_over() {
            return Err(CheckAbort::Violation(format!("only other frames within {:?}", harness.timeout)));
        }
        harness.run_batch(1, RequestSize::Mixed)?;
    }
    Ok(())
}

/// Returns true if the back-end sends back what it receives.
pub(super) fn loops_back(target: &Target) -> Result<bool, CheckAbort> {
    let mut harness = receive_harness(target)?;
    wait_until(&harness.deadline(LOOPBACK_TIMEOUT), || {
        if harness.pop()? && harness.frames_received == 0 {
            harness.add(1, RequestSize::Mixed)?;
            harness.publish();
        }
        Ok(harness.frames_received > 0)
    })
}
