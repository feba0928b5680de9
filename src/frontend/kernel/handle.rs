//! A vhost device of the kernel: the ioctls, and what the kernel may access because of them.
//!
//! The kernel reads and writes memory of this process at the addresses that it is given. [`VhostHandle`] gives it only
//! addresses of regions and logs, and keeps these mapped until the kernel uses them no more. This file has the only
//! `unsafe` code of the front-end. The order of the calls is in the files that use it.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use nix::errno::Errno;
use nix::libc;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::super::{FrontendError, RingSetup};
use super::explain::{message_error, vhost_error};
use crate::abi::vhost::{
    IotlbMsg, Msg, MsgV2, VHOST_ACCESS_RW, VHOST_FILE_UNBIND, VHOST_GET_VRING_BASE, VHOST_IOTLB_BATCH_BEGIN,
    VHOST_IOTLB_BATCH_END, VHOST_IOTLB_INVALIDATE, VHOST_IOTLB_MSG, VHOST_IOTLB_MSG_V2, VHOST_IOTLB_UPDATE,
    VHOST_SET_LOG_BASE, VHOST_SET_LOG_FD, VHOST_SET_MEM_TABLE, VHOST_SET_VRING_ADDR, VHOST_SET_VRING_BASE,
    VHOST_SET_VRING_CALL, VHOST_SET_VRING_ERR, VHOST_SET_VRING_KICK, VHOST_SET_VRING_NUM, VHOST_VDPA_GET_CONFIG,
    VHOST_VDPA_SET_CONFIG, VHOST_VRING_F_LOG, VdpaConfigHeader, VhostMemoryHeader, VhostMemoryRegion, VringAddr,
    VringFile, VringState,
};
use crate::abi::virtio::{RING_IDX_OFFSET, VirtioFeatures};
use crate::dirty::Log;
use crate::memory::{Address, GuestAddress, Memory, MemoryError, Region};
use crate::ring::{RingBase, RingLayout};
use crate::sys::nonblocking;

/// Calls that tell the kernel an address of this process, or whose argument is longer than its number says. They have
/// methods of their own.
const WITH_METHODS: [u32; 5] =
    [VHOST_SET_MEM_TABLE, VHOST_SET_VRING_ADDR, VHOST_SET_LOG_BASE, VHOST_VDPA_GET_CONFIG, VHOST_VDPA_SET_CONFIG];

/// The ioctls of an open device. Tests replace it to get errors that are hard to provoke.
pub(super) trait VhostFile: Send {
    /// Calls an ioctl.
    ///
    /// # Safety
    /// `argument` points to all that the ioctl reads and writes, or is null if it has no argument. Memory at addresses
    /// in the argument stays mapped, and is accessed as memory that others write, until the kernel uses it no more.
    unsafe fn ioctl(&self, request: u32, argument: *mut u8) -> nix::Result<()>;

    /// Writes a message.
    ///
    /// # Safety
    /// As [`VhostFile::ioctl`] for the addresses in the message.
    unsafe fn write(&self, message: &[u8]) -> nix::Result<()>;
}

impl VhostFile for File {
    unsafe fn ioctl(&self, request: u32, argument: *mut u8) -> nix::Result<()> {
        // SAFETY: the caller's promise.
        let done = unsafe { libc::ioctl(self.as_raw_fd(), request as _, argument) };
        Errno::result(done).map(drop)
    }

    unsafe fn write(&self, message: &[u8]) -> nix::Result<()> {
        match nix::unistd::write(self, message)? {
            written if written == message.len() => Ok(()),
            _ => Err(Errno::EIO),
        }
    }
}

/// The IOTLB messages that the device takes.
#[derive(Clone, Copy)]
struct Iotlb {
    /// Messages are those of version 2.
    is_v2: bool,
    has_batches: bool,
}

/// A ring whose addresses the kernel has.
struct PlacedRing {
    setup: RingSetup,
    /// The memory in which the kernel accesses the ring.
    memory: Memory,
}

/// An open device, and everything of this process that the kernel may access through it.
pub(super) struct VhostHandle {
    /// The first field: the kernel's accesses end when it is closed, before their memory is unmapped.
    file: Box<dyn VhostFile>,
    name: String,
    memory: Memory,
    /// For devices that access memory at I/O virtual addresses, which are guest-physical addresses here.
    iotlb: Option<Iotlb>,
    /// Regions that have I/O virtual addresses.
    mapped: Vec<Arc<Region>>,
    rings: BTreeMap<u16, PlacedRing>,
    log: Option<Log>,
    /// Logs that some rings may still write, after a change of the log that failed.
    retired: Vec<Log>,
}

impl VhostHandle {
    /// Takes an open device. `name` is for messages.
    pub(super) fn new(file: impl VhostFile + 'static, name: String) -> VhostHandle {
        VhostHandle {
            file: Box::new(file),
            name,
            memory: Memory::default(),
            iotlb: None,
            mapped: Vec::new(),
            rings: BTreeMap::new(),
            log: None,
            retired: Vec::new(),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Calls an ioctl whose argument is a `T`, and which has no method of its own.
    pub(super) fn call<T: FromBytes + IntoBytes + Immutable>(
        &self,
        request: u32,
        argument: &mut T,
    ) -> Result<(), FrontendError> {
        match WITH_METHODS.contains(&request) {
            true => Err(self.failed(request)(Errno::EINVAL)),
            false => self.call_with(request, argument.as_mut_bytes()),
        }
    }

    /// Calls an ioctl that reads a `T`.
    pub(super) fn set<T: FromBytes + IntoBytes + Immutable>(
        &self,
        request: u32,
        mut value: T,
    ) -> Result<(), FrontendError> {
        self.call(request, &mut value)
    }

    /// Calls an ioctl that writes a `T`.
    pub(super) fn get<T: FromBytes + IntoBytes + Immutable>(&self, request: u32) -> Result<T, FrontendError> {
        let mut value = T::new_zeroed();
        self.call(request, &mut value)?;
        Ok(value)
    }

    /// Calls an ioctl without an argument.
    pub(super) fn tell(&self, request: u32) -> Result<(), FrontendError> {
        self.call(request, &mut [0u8; 0])
    }

    /// Gives a ring a descriptor, or takes the present one away.
    pub(super) fn set_ring_fd(&self, request: u32, index: u16, fd: Option<RawFd>) -> Result<(), FrontendError> {
        self.set(request, VringFile { index: index.into(), fd: fd.unwrap_or(VHOST_FILE_UNBIND) })
    }

    /// Uses messages for guest memory, and guest-physical addresses for rings, from now on.
    pub(super) fn use_iotlb(&mut self, is_v2: bool, has_batches: bool) {
        self.iotlb = Some(Iotlb { is_v2, has_batches });
    }

    /// Sets the memory table. If that fails, the former one stays.
    pub(super) fn set_memory(&mut self, memory: &Memory) -> Result<(), FrontendError> {
        if self.iotlb.is_some() {
            let before = std::mem::replace(&mut self.memory, memory.clone());
            return self.map_memory().inspect_err(|_| {
                self.memory = before;
                // The first error tells more.
                let _ = self.map_memory();
            });
        }
        let regions = memory.regions();
        let header = VhostMemoryHeader { nregions: regions.len() as u32, padding: 0 };
        let mut table = header.as_bytes().to_vec();
        for region in regions {
            let region = VhostMemoryRegion {
                guest_phys_addr: region.gpa().0,
                memory_size: region.size(),
                userspace_addr: region.host_ptr().addr() as u64,
                flags_padding: 0,
            };
            table.extend(region.as_bytes());
        }
        self.call_with(VHOST_SET_MEM_TABLE, &mut table)?;
        self.memory = memory.clone();
        Ok(())
    }

    /// Maps the regions of memory that are not mapped, after those that are no longer in memory are unmapped.
    pub(super) fn map_memory(&mut self) -> Result<(), FrontendError> {
        self.map(self.memory.regions().to_vec())
    }

    /// Unmaps all memory.
    pub(super) fn unmap_memory(&mut self) -> Result<(), FrontendError> {
        self.map(Vec::new())
    }

    fn map(&mut self, regions: Vec<Arc<Region>>) -> Result<(), FrontendError> {
        let Some(Iotlb { is_v2, has_batches }) = self.iotlb else { return Ok(()) };
        let lacks = |list: &[Arc<Region>], region: &Arc<Region>| !list.iter().any(|other| Arc::ptr_eq(other, region));
        let old: Vec<_> = self.mapped.iter().filter(|region| lacks(&regions, region)).cloned().collect();
        let new: Vec<_> = regions.into_iter().filter(|region| lacks(&self.mapped, region)).collect();
        if old.is_empty() && new.is_empty() {
            return Ok(());
        }
        let batch = |handle: &VhostHandle, kind| match has_batches {
            true => handle.send_message(is_v2, IotlbMsg { kind, ..IotlbMsg::new_zeroed() }),
            false => Ok(()),
        };
        batch(self, VHOST_IOTLB_BATCH_BEGIN)?;
        let changed = self.change_mappings(is_v2, &old, new);
        changed.and(batch(self, VHOST_IOTLB_BATCH_END))
    }

    fn change_mappings(
        &mut self,
        is_v2: bool,
        old: &[Arc<Region>],
        new: Vec<Arc<Region>>,
    ) -> Result<(), FrontendError> {
        let message = |region: &Region, kind| IotlbMsg {
            iova: region.gpa().0,
            size: region.size(),
            uaddr: region.host_ptr().addr() as u64,
            perm: VHOST_ACCESS_RW,
            kind,
            padding: [0; 6],
        };
        for region in old {
            self.send_message(is_v2, message(region, VHOST_IOTLB_INVALIDATE))?;
            self.mapped.retain(|other| !Arc::ptr_eq(other, region));
        }
        for region in new {
            self.send_message(is_v2, message(&region, VHOST_IOTLB_UPDATE))?;
            self.mapped.push(region);
        }
        Ok(())
    }

    fn send_message(&self, is_v2: bool, iotlb: IotlbMsg) -> Result<(), FrontendError> {
        let (asid, padding, unused) = (0, 0, [0; 32]);
        let message = match is_v2 {
            true => MsgV2 { kind: VHOST_IOTLB_MSG_V2, asid, iotlb, unused }.as_bytes().to_vec(),
            false => Msg { kind: VHOST_IOTLB_MSG, padding, iotlb, unused }.as_bytes().to_vec(),
        };
        // SAFETY: the address is that of a region, which is in `mapped` until its mapping is removed or the file closed.
        let sent = unsafe { self.file.write(&message) };
        sent.map_err(|errno| message_error(&self.name, iotlb.kind, errno))
    }

    /// Sets size, position, addresses and descriptors of a ring that does not run (rule K1.2).
    pub(super) fn set_ring(&mut self, index: u16, setup: &RingSetup, log: bool) -> Result<(), FrontendError> {
        let state = |num| VringState { index: index.into(), num };
        // The kernel must not know the new size with the old addresses.
        self.rings.remove(&index);
        self.set(VHOST_SET_VRING_NUM, state(setup.size.into()))?;
        self.set(VHOST_SET_VRING_BASE, state(setup.base.bits()))?;
        self.rings.insert(index, PlacedRing { setup: setup.clone(), memory: self.memory.clone() });
        self.place_ring(index, log)?;
        let fd = |fd: &Arc<OwnedFd>| Some(fd.as_raw_fd());
        self.set_ring_fd(VHOST_SET_VRING_KICK, index, fd(&setup.kick))?;
        self.set_ring_fd(VHOST_SET_VRING_CALL, index, fd(&setup.call))?;
        self.set_ring_fd(VHOST_SET_VRING_ERR, index, setup.error.as_ref().and_then(fd))
    }

    /// Sets the addresses of a ring, which may run, in the present memory. With `log`, writes to its used ring are
    /// logged.
    pub(super) fn place_ring(&mut self, index: u16, log: bool) -> Result<(), FrontendError> {
        let Some(ring) = self.rings.get_mut(&index) else { return Ok(()) };
        let mut areas = ring_addresses(&self.memory, &ring.setup)?;
        if self.iotlb.is_some() {
            areas = [ring.setup.desc, ring.setup.avail, ring.setup.used].map(|gpa| gpa.0);
        }
        let [desc, avail, used] = areas;
        let mut addresses = VringAddr {
            index: index.into(),
            flags: if log { VHOST_VRING_F_LOG.bits() } else { 0 },
            desc_user_addr: desc,
            used_user_addr: used,
            avail_user_addr: avail,
            log_guest_addr: ring.setup.used.0,
        };
        let memory = self.memory.clone();
        self.call_with(VHOST_SET_VRING_ADDR, addresses.as_mut_bytes())?;
        self.rings.entry(index).and_modify(|ring| ring.memory = memory);
        Ok(())
    }

    /// Moves a ring, which may run, to the present memory. I/O virtual addresses do not move.
    pub(super) fn move_ring(&mut self, index: u16, log: bool) -> Result<(), FrontendError> {
        if self.iotlb.is_some() { Ok(()) } else { self.place_ring(index, log) }
    }

    /// Returns the rings that were set, as they are to be set again.
    pub(super) fn rings(&self) -> Vec<(u16, RingSetup)> {
        self.rings.iter().map(|(index, ring)| (*index, ring.setup.clone())).collect()
    }

    /// Notes the position at which a ring is to go on.
    pub(super) fn note_base(&mut self, index: u16, base: RingBase) {
        self.rings.entry(index).and_modify(|ring| ring.setup.base = base);
    }

    /// Reads the used index of a split ring in memory.
    pub(super) fn used_index(&self, index: u16) -> Result<u16, FrontendError> {
        let not_set = || FrontendError::InvalidRing { index, reason: "it is not started".into() };
        let ring = self.rings.get(&index).ok_or_else(not_set)?;
        let mut bytes = [0; 2];
        self.memory.read(GuestAddress(ring.setup.used.0.saturating_add(RING_IDX_OFFSET)), &mut bytes)?;
        // What the device has written before it completed a request is visible after its index.
        fence(Ordering::Acquire);
        Ok(u16::from_le_bytes(bytes))
    }

    /// Reads configuration space.
    pub(super) fn config(&self, offset: u32, bytes: &mut [u8]) -> Result<(), FrontendError> {
        let mut argument = config_argument(offset, bytes);
        self.call_with(VHOST_VDPA_GET_CONFIG, &mut argument)?;
        let read = argument.split_off(size_of::<VdpaConfigHeader>());
        bytes.iter_mut().zip(read).for_each(|(to, from)| *to = from);
        Ok(())
    }

    /// Writes configuration space.
    pub(super) fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<(), FrontendError> {
        self.call_with(VHOST_VDPA_SET_CONFIG, &mut config_argument(offset, bytes))
    }

    /// Checks that a ring can be placed in `memory`.
    pub(super) fn check_place(&self, index: u16, memory: &Memory) -> Result<(), FrontendError> {
        self.rings.get(&index).map_or(Ok(()), |ring| ring_addresses(memory, &ring.setup).map(drop))?;
        Ok(())
    }

    /// Kicks some of the rings.
    pub(super) fn kick_rings(&self, which: impl Fn(u16) -> bool) {
        for (_, ring) in self.rings.iter().filter(|(index, _)| which(**index)) {
            // A pending kick is as good as a new one.
            let _ = nonblocking::signal(ring.setup.kick.as_fd());
        }
    }

    /// Returns the position of a ring. While the ring runs it changes.
    pub(super) fn ring_base(&self, index: u16) -> Result<RingBase, FrontendError> {
        let mut state = VringState { index: index.into(), num: 0 };
        self.call(VHOST_GET_VRING_BASE, &mut state)?;
        Ok(RingBase::from_bits(state.num))
    }

    /// Sets the log, or takes it away. A new log also gets the marks of the former one (rule L9.3). After an error the
    /// former log is in use.
    pub(super) fn set_log(&mut self, log: Option<Log>) -> Result<(), FrontendError> {
        let copy = |from: &Option<Log>, to: &Option<Log>| {
            from.iter().zip(to).for_each(|(from, to)| from.copy_to(to));
        };
        let Err(failed) = self.set_log_base(log.as_ref()) else {
            copy(&self.log, &log);
            self.log = log;
            return Ok(());
        };
        // Some rings may have the new log.
        let restored = self.set_log_base(self.log.as_ref());
        copy(&log, &self.log);
        if restored.is_err() {
            self.retired.extend(log);
        }
        Err(failed)
    }

    fn set_log_base(&self, log: Option<&Log>) -> Result<(), FrontendError> {
        let address = log.map_or(0, |log| log.address().addr() as u64);
        self.call_with(VHOST_SET_LOG_BASE, address.to_ne_bytes().as_mut_slice())
    }

    /// Sets the eventfd that the kernel signals after it has logged, or takes it away.
    pub(super) fn set_log_fd(&self, signal: Option<BorrowedFd<'_>>) -> Result<(), FrontendError> {
        self.set(VHOST_SET_LOG_FD, signal.map_or(VHOST_FILE_UNBIND, |fd| fd.as_raw_fd()))
    }

    fn call_with(&self, request: u32, argument: &mut [u8]) -> Result<(), FrontendError> {
        // The size in an ioctl's number is that of its structure; regions may follow a memory table.
        let size = (request >> 16 & 0x3fff) as usize;
        if argument.len() < size {
            return Err(self.failed(request)(Errno::EINVAL));
        }
        // SAFETY: the argument has the size that the number names; a memory table has the regions, and a configuration
        // the bytes, that its header counts. Addresses are those of regions in `memory` and in `rings`, and of logs in `log` and `retired`, which
        // are dropped after the kernel has others or the file is closed. All of them are accessed as shared memory.
        let done = unsafe { self.file.ioctl(request, argument.as_mut_ptr()) };
        done.map_err(self.failed(request))
    }

    fn failed(&self, request: u32) -> impl FnOnce(Errno) -> FrontendError {
        move |errno| vhost_error(&self.name, request, errno)
    }
}

fn config_argument(off: u32, bytes: &[u8]) -> Vec<u8> {
    [VdpaConfigHeader { off, len: bytes.len() as u32 }.as_bytes(), bytes].concat()
}

/// Returns the addresses of descriptor table, avail ring and used ring in this process.
///
/// # Errors
/// [`MemoryError::NotMapped`] for an area that is not inside one region.
pub(super) fn ring_addresses(memory: &Memory, setup: &RingSetup) -> Result<[u64; 3], MemoryError> {
    let [desc, avail, used] = RingLayout::area_bytes(VirtioFeatures::empty(), setup.size);
    Ok([address(memory, setup.desc, desc)?, address(memory, setup.avail, avail)?, address(memory, setup.used, used)?])
}

fn address(memory: &Memory, gpa: GuestAddress, len: u64) -> Result<u64, MemoryError> {
    let in_region = |region: &Arc<Region>| {
        let offset = gpa.checked_offset_from(region.gpa())?;
        region.slice(offset, len)?;
        (region.host_ptr().addr() as u64).checked_add(offset)
    };
    memory.regions().iter().find_map(in_region).ok_or(MemoryError::NotMapped { gpa, len })
}
