//! Vsock: connection requests of the guest, and replies or requests of the host.
//!
//! A request to a port without a listener is answered with a reset (virtio 1.2, 5.10.6.4.2): such a device is its own
//! frame source. Otherwise the host's socket of vhost-device-vsock, Cloud Hypervisor and Firecracker is used: `CONNECT`
//! and a port on it become a request to the guest.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::abi::vhost_user::ProtocolFeatures;
use crate::check::connection::Connection;
use crate::check::device::blk::read_config;
use crate::check::negotiation::BackendFeatures;
use crate::check::outcome::CheckAbort;

/// Context id of the host.
const HOST_CID: u64 = 2;
/// Lowest context id of a guest, for a device without configuration space.
const MIN_GUEST_CID: u64 = 3;
/// First port in use. Nothing listens on it.
const FIRST_PORT: u32 = 0x7ffe_0000;
const STREAM: u16 = 1;
const OP_REQUEST: u16 = 1;
const OP_RST: u16 = 3;
/// Attempts to connect, after the first, while the back-end closes the connection.
const CONNECT_RETRIES: u32 = 10;
const CONNECT_INTERVAL: Duration = Duration::from_millis(50);
/// Size of a packet buffer, as in Linux.
pub(in crate::check) const BUFFER_BYTES: u32 = 4096;

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct PacketHeader {
    src_cid: U64,
    dst_cid: U64,
    src_port: U32,
    dst_port: U32,
    len: U32,
    kind: U16,
    op: U16,
    flags: U32,
    buf_alloc: U32,
    fwd_cnt: U32,
}

/// Reads the guest's context id from configuration space.
pub(in crate::check) fn context_id(connection: &Connection, offered: BackendFeatures) -> Result<u64, CheckAbort> {
    if !offered.has_protocol(ProtocolFeatures::CONFIG) {
        return Ok(MIN_GUEST_CID);
    }
    let config = read_config(connection, 0, 8)?;
    Ok(config.first_chunk().map_or(MIN_GUEST_CID, |bytes| u64::from_le_bytes(*bytes)))
}

/// Builds packet `number` of the guest: a connection request that is not accepted.
pub(in crate::check) fn packet(cid: u64, number: u64) -> Vec<u8> {
    let header = PacketHeader {
        src_cid: cid.into(),
        dst_cid: HOST_CID.into(),
        src_port: port(number).into(),
        dst_port: FIRST_PORT.into(),
        kind: STREAM.into(),
        op: OP_REQUEST.into(),
        buf_alloc: BUFFER_BYTES.into(),
        ..PacketHeader::new_zeroed()
    };
    header.as_bytes().to_vec()
}

fn port(number: u64) -> u32 {
    FIRST_PORT + 1 + (number % 0x1_0000) as u32
}

/// Makes the host request a connection to the guest. A back-end closes it unread while its rings are not running yet.
pub(in crate::check) fn connect(path: &Path, number: u64) -> Result<UnixStream, CheckAbort> {
    for _ in 0..CONNECT_RETRIES {
        match request_connection(path, number) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => thread::sleep(CONNECT_INTERVAL),
            requested => return Ok(requested?),
        }
    }
    Ok(request_connection(path, number)?)
}

fn request_connection(path: &Path, number: u64) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    writeln!(stream, "CONNECT {}", port(number))?;
    Ok(stream)
}

/// Checks a received packet. Returns true if it belongs to one of our ports.
pub(in crate::check) fn received(cid: u64, packet: &[u8]) -> Result<bool, CheckAbort> {
    let Ok((header, data)) = PacketHeader::read_from_prefix(packet) else {
        return Err(CheckAbort::Violation(format!("a packet of {} bytes came in", packet.len())));
    };
    let (from, to, len) = (header.src_cid.get(), header.dst_cid.get(), header.len.get());
    if to != cid || len as usize != data.len() {
        return Err(CheckAbort::Violation(format!(
            "a packet for context id {to} with {} of {len} bytes came in to {cid}",
            data.len()
        )));
    }
    let ours = header.dst_port.get() > FIRST_PORT && [OP_REQUEST, OP_RST].contains(&header.op.get());
    Ok(from == HOST_CID && ours)
}
