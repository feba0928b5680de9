//! A guest without a CPU for devices of the kernel: memory, rings in it, and their completions.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::read;
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::dirty::{Log, PageSet};
use vhost_migrate::frontend::RingSetup;
use vhost_migrate::memory::{GuestAddress, LOG_PAGE, Memory, PageNumber, Region};
use vhost_migrate::ring::{Buffer, DriverRing, DriverRingState, RingBase, RingError, RingLayout, UsedBuffer};

use crate::wait::is_readable;

/// Time to wait for the kernel, milliseconds.
const PATIENCE: u16 = 20_000;
/// Entries of a ring.
const SIZE: u16 = 64;

/// Memory of `pages` pages at `gpa`.
pub(crate) fn region(gpa: u64, pages: u64) -> Arc<Region> {
    Arc::new(Region::create(GuestAddress(gpa), pages * LOG_PAGE).unwrap())
}

pub(crate) fn eventfd() -> Arc<OwnedFd> {
    Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).unwrap().into())
}

/// A split ring and its driver. Its areas are on the pages `page`, `page + 1` and `page + 2`.
pub(crate) struct Ring {
    page: u64,
    pub(crate) driver: DriverRing,
    pub(crate) setup: RingSetup,
}

impl Ring {
    pub(crate) fn new(memory: &Memory, page: u64, features: VirtioFeatures) -> Ring {
        Ring::with(page, features, RingBase::initial(features), |layout| DriverRing::new(memory, layout, features))
    }

    /// A ring that goes on at `base`, with its driver's state.
    pub(crate) fn restore(
        memory: &Memory,
        page: u64,
        features: VirtioFeatures,
        state: &DriverRingState,
        base: RingBase,
    ) -> Ring {
        Ring::with(page, features, base, |layout| DriverRing::restore(memory, layout, features, state))
    }

    fn with(
        page: u64,
        features: VirtioFeatures,
        base: RingBase,
        open: impl FnOnce(RingLayout) -> Result<DriverRing, RingError>,
    ) -> Ring {
        let [desc, avail, used] = [page, page + 1, page + 2].map(|page| PageNumber(page).address());
        let driver = open(RingLayout::new(features, SIZE, [desc, avail, used])).unwrap();
        let (kick, call) = (eventfd(), eventfd());
        Ring { page, driver, setup: RingSetup { size: SIZE, desc, avail, used, kick, call, error: None, base } }
    }

    /// The pages that the driver writes.
    pub(crate) fn driver_pages(&self) -> [u64; 2] {
        [self.page, self.page + 1]
    }

    /// The page of the used ring.
    pub(crate) fn used_page(&self) -> u64 {
        self.page + 2
    }

    /// Publishes a request of one buffer, of `len` bytes at the beginning of a page.
    pub(crate) fn add(&mut self, page: u64, len: u32, writable: bool) {
        self.add_buffers(&[(page, len)], writable);
    }

    pub(crate) fn add_buffers(&mut self, buffers: &[(u64, u32)], writable: bool) {
        let buffers: Vec<_> =
            buffers.iter().map(|(page, len)| Buffer { gpa: PageNumber(*page).address(), len: *len }).collect();
        let (out, into) = if writable { (&[][..], &buffers[..]) } else { (&buffers[..], &[][..]) };
        self.publish(out, into);
    }

    /// Publishes a request.
    pub(crate) fn publish(&mut self, readable: &[Buffer], writable: &[Buffer]) {
        self.driver.add(readable, writable, None).unwrap().unwrap();
        if self.driver.publish() {
            nix::unistd::write(&self.setup.kick, &1u64.to_ne_bytes()).unwrap();
        }
    }

    /// Waits for a completion.
    pub(crate) fn completion(&mut self) -> UsedBuffer {
        loop {
            if let Some(used) = self.driver.pop_used().unwrap() {
                return used;
            }
            assert!(is_readable(&self.setup.call.as_fd(), PATIENCE), "no completion");
            read(&self.setup.call, &mut [0; 8]).unwrap();
        }
    }
}

/// A page of memory.
pub(crate) fn page(memory: &Memory, page: u64) -> Vec<u8> {
    let mut bytes = vec![0; LOG_PAGE as usize];
    memory.read(PageNumber(page).address(), &mut bytes).unwrap();
    bytes
}

/// The contents of all pages.
pub(crate) fn snapshot(memory: &Memory) -> Vec<(u64, Vec<u8>)> {
    let pages = memory.regions().iter().flat_map(|region| region.pages().numbers());
    pages.map(|number| (number, page(memory, number))).collect()
}

/// The pages that differ from a snapshot.
pub(crate) fn changed(memory: &Memory, before: &[(u64, Vec<u8>)]) -> BTreeSet<u64> {
    before.iter().filter(|(number, bytes)| page(memory, *number) != *bytes).map(|(number, _)| *number).collect()
}

/// Takes the marks out of a log.
pub(crate) fn harvest(log: &Log) -> BTreeSet<u64> {
    let mut set = PageSet::default();
    log.harvest(&mut set);
    set.iter().map(|PageNumber(page)| page).collect()
}
