//! A network interface: frames, what brings them in, and what only such a device has to keep.
//!
//! What is sent changes no page but the ring's. Frames that come in do, so the checks of the log need somebody who brings
//! them: the back-end itself, if it sends back what it is sent, an interface of the host, or another back-end.

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

/// Bytes before every packet in a ring, as VERSION_1 has it.
pub(super) const HEADER: usize = 12;
/// The longest frame without a larger MTU.
pub(super) const MAX_FRAME_BYTES: usize = 1514;
/// Ethernet, IP and UDP headers of a frame: what makes it one of ours comes behind them, whoever sent it.
const HEADERS: usize = 42;
const TAG: u64 = 0x6b63_6568_632d_6d76;
/// An ether type for experiments (IEEE 802).
const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];
/// Frames that may be in flight towards the back-end that loops them.
const MAX_IN_FLIGHT: u64 = 32;
/// How long a frame may take to come back from who was not said to loop them.
const LOOPBACK_TIMEOUT: Duration = Duration::from_secs(2);

/// Where frames for the device under test come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameSource {
    /// From itself: it sends back what it is sent.
    Loop,
    /// From this interface of the host, on whose other side the device is: a tap.
    Interface(String),
    /// From another vhost-user back-end at this socket, whose frames arrive at the device. Of vsock, the socket of the host's
    /// side, which CONNECT and a port are said to.
    Backend(PathBuf),
    /// From a TCP connection to this address, whose bytes a console has typed.
    Tcp(String),
}

/// What brings something in.
pub(super) enum FrameInjector {
    /// The transmit rings of the same harness.
    Loop,
    Interface(UdpSocket),
    /// The transmit ring of a harness of its own.
    Backend(Box<Harness>),
    /// The host's side of vsock, and its connections: one that ends at once is not heard.
    VsockHost(PathBuf, VecDeque<UnixStream>),
    /// Whoever types at a console.
    Tcp(TcpStream),
}

impl FrameInjector {
    /// An interface, that broadcasts leave by.
    pub(super) fn interface(name: &str) -> Result<FrameInjector, CheckAbort> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        setsockopt(&socket, BindToDevice, &name.into())?;
        socket.set_broadcast(true)?;
        Ok(FrameInjector::Interface(socket))
    }
}

/// What follows the headers of frame `number`, as long as all frames are, or as they come.
pub(super) fn payload(number: u64, long: bool) -> Vec<u8> {
    let most = MAX_FRAME_BYTES - HEADERS;
    let len = if long { most } else { 40 + (number * 131) as usize % (most - 40) };
    let rest = noise(number, (len - 16) as u32);
    [&TAG.to_le_bytes(), &number.to_le_bytes(), rest.as_slice()].concat()
}

/// A frame with this payload.
pub(super) fn frame(payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 0x77]);
    frame.extend(ETHER_TYPE);
    frame.resize(HEADERS, 0);
    frame.extend(payload);
    frame
}

/// A frame with this payload, as it lies in a ring.
pub(super) fn packet(payload: &[u8]) -> Vec<u8> {
    [&[0; HEADER], frame(payload).as_slice()].concat()
}

/// Sends a packet over a transmit ring that is for nothing else; false while that is full.
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

/// Checks a packet that came in: if it is one of ours, it is as it was sent; true if it is.
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
        false => Err(CheckAbort::Violation("a frame arrived that is not as it was sent".into())),
    }
}

/// A receive ring that waits for one frame.
fn receive_harness(target: &Target) -> Result<Harness, CheckAbort> {
    let mut harness = target.harness(0)?;
    harness.start()?;
    harness.add(1, RequestSize::Mixed)?;
    harness.publish();
    Ok(harness)
}

/// Whether frames come in that were brought; an interface of the host has others of its own.
pub(super) fn wait_for_frame(target: &Target) -> Result<(), CheckAbort> {
    let mut harness = receive_harness(target)?;
    let deadline = harness.deadline(harness.timeout);
    harness.finish()?;
    while harness.frames_received == 0 {
        if deadline.is_over() {
            return Err(CheckAbort::Violation(format!("only frames of others within {:?}", harness.timeout)));
        }
        harness.run_batch(1, RequestSize::Mixed)?;
    }
    Ok(())
}

/// Whether the back-end sends back what it is sent.
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
