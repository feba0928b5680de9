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

use nix::errno::Errno;
use nix::libc;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::super::{FrontendError, RingSetup};
use super::explain::vhost_error;
use crate::abi::vhost::{
    VHOST_FILE_UNBIND, VHOST_GET_VRING_BASE, VHOST_SET_LOG_BASE, VHOST_SET_LOG_FD, VHOST_SET_MEM_TABLE,
    VHOST_SET_VRING_ADDR, VHOST_SET_VRING_BASE, VHOST_SET_VRING_CALL, VHOST_SET_VRING_ERR, VHOST_SET_VRING_KICK,
    VHOST_SET_VRING_NUM, VHOST_VRING_F_LOG, VhostMemoryHeader, VhostMemoryRegion, VringAddr, VringFile, VringState,
};
use crate::abi::virtio::VirtioFeatures;
use crate::dirty::Log;
use crate::memory::{Address, GuestAddress, Memory, MemoryError, Region};
use crate::ring::{RingBase, RingLayout};
use crate::sys::nonblocking;

/// Calls that tell the kernel an address of this process. They have methods of their own.
const WITH_ADDRESSES: [u32; 3] = [VHOST_SET_MEM_TABLE, VHOST_SET_VRING_ADDR, VHOST_SET_LOG_BASE];

/// The ioctls of an open device. Tests replace it to get errors that are hard to provoke.
pub(super) trait VhostFile: Send {
    /// Calls an ioctl.
    ///
    /// # Safety
    /// `argument` points to all that the ioctl reads and writes, or is null if it has no argument. Memory at addresses
    /// in the argument stays mapped, and is accessed as memory that others write, until the kernel uses it no more.
    unsafe fn ioctl(&self, request: u32, argument: *mut u8) -> nix::Result<()>;
}

impl VhostFile for File {
    unsafe fn ioctl(&self, request: u32, argument: *mut u8) -> nix::Result<()> {
        // SAFETY: the caller's promise.
        let done = unsafe { libc::ioctl(self.as_raw_fd(), request.into(), argument) };
        Errno::result(done).map(drop)
    }
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
            rings: BTreeMap::new(),
            log: None,
            retired: Vec::new(),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Calls an ioctl whose argument is a `T`, and which has no addresses in it.
    pub(super) fn call<T: FromBytes + IntoBytes + Immutable>(
        &self,
        request: u32,
        argument: &mut T,
    ) -> Result<(), FrontendError> {
        match WITH_ADDRESSES.contains(&request) {
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

    /// Sets the memory table. If that fails, the former one stays.
    pub(super) fn set_memory(&mut self, memory: &Memory) -> Result<(), FrontendError> {
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
        let [desc, avail, used] = ring_addresses(&self.memory, &ring.setup)?;
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
        // SAFETY: the argument has the size that the number names, and a memory table has the regions that its header
        // counts. Addresses are those of regions in `memory` and in `rings`, and of logs in `log` and `retired`, which
        // are dropped after the kernel has others or the file is closed. All of them are accessed as shared memory.
        let done = unsafe { self.file.ioctl(request, argument.as_mut_ptr()) };
        done.map_err(self.failed(request))
    }

    fn failed(&self, request: u32) -> impl FnOnce(Errno) -> FrontendError {
        move |errno| vhost_error(&self.name, request, errno)
    }
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
