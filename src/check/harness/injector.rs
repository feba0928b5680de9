//! Frame sources.
//!
//! Transmitted frames change no page except the ring's. Received frames do, so the checks of the log need a frame
//! source: the back-end itself if it sends frames back, an interface of the host, or another back-end.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nix::sys::socket::{setsockopt, sockopt::BindToDevice};

use super::{FRAMES, Harness};
use crate::check::outcome::CheckAbort;
use crate::check::queue::DriverQueue;
use crate::memory::{Address, LOG_PAGE, Memory};
use crate::ring::Buffer;

/// Maximum number of frames in flight towards a loopback.
const MAX_IN_FLIGHT: u64 = 32;

/// An opened frame source.
pub(in crate::check) enum FrameInjector {
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
    pub(in crate::check) fn interface(name: &str) -> Result<FrameInjector, CheckAbort> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        setsockopt(&socket, BindToDevice, &name.into())?;
        socket.set_broadcast(true)?;
        Ok(FrameInjector::Interface(socket))
    }
}

/// Sends a packet over a transmit ring that has no other use. Returns false while the ring is full.
pub(super) fn send(queue: &mut DriverQueue, memory: &Memory, number: u64, packet: &[u8]) -> Result<bool, CheckAbort> {
    while queue.driver.pop_used()?.is_some() {}
    if u64::from(queue.driver.outstanding()) >= MAX_IN_FLIGHT {
        return Ok(false);
    }
    let gpa = FRAMES.unchecked_add(number % (2 * MAX_IN_FLIGHT) * LOG_PAGE);
    memory.write(gpa, packet)?;
    let sent = queue.driver.add(&[Buffer { gpa, len: packet.len() as u32 }], &[], None)?.is_some();
    queue.publish();
    queue.signal_kick();
    Ok(sent)
}
