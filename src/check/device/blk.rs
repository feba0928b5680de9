//! Block devices: geometry and reads; and reads of the configuration space of any device.

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::abi::vhost_user::{CONFIG_TYPE_FRONTEND, ConfigHeader, FrontendRequest as Code, ProtocolFeatures};
use crate::abi::virtio::{
    BlkConfig, BlkRequestHeader, SECTOR_BYTES, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN,
};
use crate::check::connection::Connection;
use crate::check::negotiation::BackendFeatures;
use crate::check::outcome::CheckAbort;

/// Size assumed for a disk without configuration space, bytes.
const MIN_DISK_BYTES: u64 = 4096;
/// Bytes of configuration space that every block device has.
const CONFIG_BYTES: u32 = 36;
/// Maximum block size with room for all requests, bytes.
const MAX_BLOCK_BYTES: u64 = 64 << 10;
/// A status byte that no device writes.
pub(in crate::check) const NO_STATUS: u8 = 0xff;

/// Capacity and block size of the device under test.
#[derive(Clone, Copy, Debug)]
pub(in crate::check) struct BlkGeometry {
    pub(in crate::check) sectors: u64,
    /// Sectors per block. Requests cover whole blocks.
    pub(in crate::check) block_sectors: u64,
}

impl BlkGeometry {
    /// Reads the geometry from configuration space, after protocol features are negotiated.
    pub(in crate::check) fn of(connection: &Connection, offered: BackendFeatures) -> Result<BlkGeometry, CheckAbort> {
        if !offered.has_protocol(ProtocolFeatures::CONFIG) {
            let sectors = MIN_DISK_BYTES / SECTOR_BYTES;
            return Ok(BlkGeometry { sectors, block_sectors: sectors });
        }
        // Read from offset 0: some back-ends ignore the offset (rule C1.1).
        let mut config = BlkConfig::new_zeroed();
        let received = read_config(connection, 0, CONFIG_BYTES)?;
        config.as_mut_bytes().iter_mut().zip(received).for_each(|(byte, received)| *byte = received);
        let sectors = config.capacity.get();
        let block = match offered.has(VIRTIO_BLK_F_BLK_SIZE) {
            true => u64::from(config.blk_size.get()),
            false => SECTOR_BYTES,
        };
        if !block.is_power_of_two() || !(SECTOR_BYTES..=MAX_BLOCK_BYTES).contains(&block) {
            return Err(CheckAbort::Violation(format!("a disk with blocks of {block} bytes cannot be checked")));
        }
        let block = block / SECTOR_BYTES;
        match sectors / block * block {
            0 => Err(CheckAbort::Violation(format!("the disk has {sectors} sectors and blocks of {block}"))),
            sectors => Ok(BlkGeometry { sectors, block_sectors: block }),
        }
    }

    pub(in crate::check) fn bytes(&self) -> u64 {
        self.sectors.saturating_mul(SECTOR_BYTES)
    }

    /// Returns the header of read `number`, and its length: up to `len` bytes in whole blocks.
    pub(in crate::check) fn read(&self, number: u64, len: u64) -> (BlkRequestHeader, u32) {
        let (blocks, block) = (self.sectors / self.block_sectors, self.block_sectors * SECTOR_BYTES);
        let count = (len.max(block) / block).min(blocks);
        let sector = number.wrapping_mul(97) % (blocks - count + 1) * self.block_sectors;
        let len = count * self.block_sectors;
        let head = BlkRequestHeader { request_type: VIRTIO_BLK_T_IN.into(), ioprio: 0.into(), sector: sector.into() };
        (head, (len * SECTOR_BYTES) as u32)
    }

    /// Returns true for the status of a successful read.
    pub(in crate::check) fn is_success(status: u8) -> bool {
        status == VIRTIO_BLK_S_OK
    }
}

/// Reads configuration space and checks the reply (rule C1.1).
pub(in crate::check) fn read_config(connection: &Connection, offset: u32, size: u32) -> Result<Vec<u8>, CheckAbort> {
    let header = ConfigHeader { offset, size, flags: CONFIG_TYPE_FRONTEND };
    let reply = connection.request(Code::GET_CONFIG, &[header.as_bytes(), &vec![0; size as usize]].concat())?;
    let Ok((echo, bytes)) = ConfigHeader::read_from_prefix(&reply.payload) else {
        return Err(short(size_of::<ConfigHeader>() + size as usize, reply.payload.len()));
    };
    if (echo.offset, echo.size) != (offset, size) {
        let ConfigHeader { offset: at, size: len, .. } = echo;
        return Err(CheckAbort::Violation(format!("{len} bytes at {at} were returned instead of {size} at {offset}")));
    }
    match bytes.len() == size as usize {
        true => Ok(bytes.to_vec()),
        false => Err(short(size as usize, bytes.len())),
    }
}

fn short(needed: usize, got: usize) -> CheckAbort {
    CheckAbort::Violation(format!("GET_CONFIG returned {got} bytes instead of {needed}"))
}
