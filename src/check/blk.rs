//! A block device: how to make it write to guest memory without changing its disk, and its configuration space.

use zerocopy::{FromBytes, IntoBytes};

use super::link::Link;
use super::{Bench, Check, Fault, Offer, Outcome};
use crate::abi::vhost_user::{CONFIG_TYPE_FRONTEND, ConfigHeader, Request as Code, protocol_feature};
use crate::abi::virtio::{BlkRequestHeader, SECTOR_BYTES, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN};

/// Bytes that a read takes of a disk whose size is not told: nobody makes a smaller one.
const AT_LEAST: u64 = 4096;
/// A status that no device writes.
pub(super) const NO_STATUS: u8 = 0xff;

pub(super) const CHECKS: &[Check] =
    &[Check { rule: "C1", what: "GET_CONFIG echoes offset and size, and parts agree with the whole", run: config }];

/// The disk under test.
#[derive(Clone, Copy, Debug)]
pub(super) struct Disk {
    sectors: u64,
}

impl Disk {
    /// Asks a connection with agreed protocol features how large its disk is.
    pub(super) fn of(link: &Link, offer: Offer) -> Result<Disk, Fault> {
        if !offer.speaks(protocol_feature::CONFIG) {
            return Ok(Disk { sectors: AT_LEAST / SECTOR_BYTES });
        }
        let capacity = read_config(link, 0, 8)?;
        let sectors = u64::read_from_bytes(&capacity).map_err(|_| short(8, capacity.len()))?;
        match sectors {
            0 => Err(Fault::Breach("the disk has no sectors".into())),
            sectors => Ok(Disk { sectors: u64::from_le(sectors) }),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.sectors.saturating_mul(SECTOR_BYTES)
    }

    /// The head of read number `number`, and how many of `len` bytes it can have.
    pub(super) fn read(&self, number: u64, len: u64) -> (BlkRequestHeader, u32) {
        let len = len.min(self.bytes()).max(SECTOR_BYTES) / SECTOR_BYTES;
        let sector = number.wrapping_mul(97) % (self.sectors - len + 1);
        let head = BlkRequestHeader { request_type: VIRTIO_BLK_T_IN.into(), ioprio: 0.into(), sector: sector.into() };
        (head, (len * SECTOR_BYTES) as u32)
    }

    /// Whether a status is that of a read that worked.
    pub(super) fn worked(status: u8) -> bool {
        status == VIRTIO_BLK_S_OK
    }
}

/// Bytes of configuration space, out of an answer that is checked (rule C1).
fn read_config(link: &Link, offset: u32, size: u32) -> Result<Vec<u8>, Fault> {
    let header = ConfigHeader { offset, size, flags: CONFIG_TYPE_FRONTEND };
    let reply = link.ask(Code::GET_CONFIG, &[header.as_bytes(), &vec![0; size as usize]].concat())?;
    let Ok((echo, bytes)) = ConfigHeader::read_from_prefix(&reply.payload) else {
        return Err(short(size_of::<ConfigHeader>() + size as usize, reply.payload.len()));
    };
    if (echo.offset, echo.size) != (offset, size) {
        let ConfigHeader { offset: at, size: len, .. } = echo;
        return Err(Fault::Breach(format!("asked for {size} bytes at {offset}, it answers with {len} at {at}")));
    }
    match bytes.len() == size as usize {
        true => Ok(bytes.to_vec()),
        false => Err(short(size as usize, bytes.len())),
    }
}

fn short(needed: usize, got: usize) -> Fault {
    Fault::Breach(format!("GET_CONFIG: {got} bytes where {needed} were due"))
}

fn config(bench: &mut Bench) -> Result<Outcome, Fault> {
    bench.offer.need(protocol_feature::CONFIG)?;
    let rig = bench.rig(0)?;
    // As much as the oldest front-ends read.
    let whole = read_config(&rig.link, 0, 36)?;
    for (offset, size) in [(0u32, 8u32), (8, 4), (20, 4), (4, 12), (35, 1)] {
        let part = read_config(&rig.link, offset, size)?;
        if whole.get(offset as usize..(offset + size) as usize) != Some(&part) {
            return Ok(Outcome::broken(format!("{size} bytes at {offset} differ from those in the whole")));
        }
    }
    Ok(Outcome::kept(format!("a disk of {} sectors; 5 parts read", bench.disk.sectors)))
}
