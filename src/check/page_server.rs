//! Removal of guest memory, and the server that places its pages again when the back-end needs them (rule P1.6):
//! through the back-end's userfaultfd, at the addresses in its reply.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::connection::readable;
use super::harness::Harness;
use super::outcome::CheckAbort;
use super::pages::Pages;
use super::stop::StopToken;
use crate::abi::vhost_user::MemoryRegion;
use crate::memory::{Address, FaultAddress, GuestAddress, LOG_PAGE, Memory, Userfault};

/// Upper limit of one wait for faults.
const POLL_INTERVAL: Duration = Duration::from_secs(60);

/// All bytes of a guest's memory, by region.
#[derive(Clone)]
pub(super) struct MemoryContents(Vec<(GuestAddress, Vec<u8>)>);

impl MemoryContents {
    pub(super) fn of(memory: &Memory) -> Result<MemoryContents, CheckAbort> {
        let region = |gpa, size: u64| {
            let mut bytes = vec![0; size as usize];
            memory.read(gpa, &mut bytes).map(|()| (gpa, bytes))
        };
        let regions = memory.regions().iter().map(|it| region(it.gpa(), it.size()));
        Ok(MemoryContents(regions.collect::<Result<_, _>>()?))
    }

    /// Punches out all pages of a guest's memory files. Returns the old contents.
    pub(super) fn punch_out(harness: &Harness) -> Result<MemoryContents, CheckAbort> {
        let contents = MemoryContents::of(&harness.memory)?;
        for (fd, (_, bytes)) in harness.fds().into_iter().zip(&contents.0) {
            let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(fd, hole, 0, bytes.len() as i64)?;
        }
        Ok(contents)
    }

    /// Returns the page that contains `gpa`.
    pub(super) fn page(&self, gpa: GuestAddress) -> Option<&[u8]> {
        self.pages().find(|(page, _)| *page == gpa.0 / LOG_PAGE).map(|(_, bytes)| bytes)
    }

    /// Returns all pages with their numbers.
    pub(super) fn pages(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.0.iter().flat_map(|(gpa, bytes)| (gpa.0 / LOG_PAGE..).zip(bytes.chunks(LOG_PAGE as usize)))
    }

    /// Changes bytes at `gpa`, if they are part of a region.
    pub(super) fn put(&mut self, gpa: GuestAddress, bytes: &[u8]) {
        let place = self.0.iter_mut().find_map(|(start, held)| {
            let offset = gpa.checked_offset_from(*start)? as usize;
            held.get_mut(offset..offset + bytes.len())
        });
        if let Some(place) = place {
            place.copy_from_slice(bytes);
        }
    }
}

/// Serves the page faults of a back-end.
pub(super) struct PageServer {
    userfault: Userfault,
    /// Addresses of guest memory in the back-end.
    regions: Vec<MemoryRegion>,
    contents: MemoryContents,
    /// Pages from this guest-physical address on are not placed on faults.
    withhold_from: GuestAddress,
    /// Signalled at a fault on a withheld page.
    pub(super) withheld: EventFd,
    stop: EventFd,
}

impl PageServer {
    pub(super) fn new(
        userfault: Userfault,
        regions: Vec<MemoryRegion>,
        contents: MemoryContents,
        withhold_from: GuestAddress,
    ) -> Result<PageServer, CheckAbort> {
        let eventfd = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        Ok(PageServer { userfault, regions, contents, withhold_from, withheld: eventfd()?, stop: eventfd()? })
    }

    /// Serves faults until [`stop`](PageServer::stop). Returns the pages that were requested.
    pub(super) fn serve(&self) -> Result<Pages, CheckAbort> {
        let mut asked = Pages::new();
        loop {
            readable(&[self.userfault.as_fd(), self.stop.as_fd()], &StopToken::default().deadline(POLL_INTERVAL));
            while let Some(address) = self.userfault.fault()? {
                let Some(gpa) = self.gpa(address) else {
                    return Err(CheckAbort::Violation(format!(
                        "a page fault at {address:#x}, which is outside the regions of the reply"
                    )));
                };
                asked.insert(gpa.0 / LOG_PAGE);
                if gpa < self.withhold_from {
                    self.place_page(gpa)?;
                } else {
                    self.withheld.write(1)?;
                }
            }
            if self.stop.read().is_ok() {
                return Ok(asked);
            }
        }
    }

    /// Returns the contents that are served.
    pub(super) fn contents(&self) -> &MemoryContents {
        &self.contents
    }

    /// Ends [`serve`](PageServer::serve).
    pub(super) fn stop(&self) {
        // An error means that the eventfd is signalled already.
        let _ = self.stop.write(1);
    }

    /// Places all pages.
    pub(super) fn place_all(&self) -> Result<(), CheckAbort> {
        self.contents.pages().try_for_each(|(page, bytes)| self.place(GuestAddress(page * LOG_PAGE), bytes))
    }

    /// Places the page that contains `gpa`.
    pub(super) fn place_page(&self, gpa: GuestAddress) -> Result<(), CheckAbort> {
        self.contents.page(gpa).map_or(Ok(()), |bytes| self.place(GuestAddress(gpa.0 / LOG_PAGE * LOG_PAGE), bytes))
    }

    /// Places a page and wakes its waiters.
    fn place(&self, gpa: GuestAddress, bytes: &[u8]) -> Result<(), CheckAbort> {
        let Some(address) = self.address(gpa) else { return Ok(()) };
        let placed = self.userfault.place_at(address, bytes).and_then(|placed| match placed {
            true => Ok(()),
            // The page is there already, but a thread may still wait for it.
            false => self.userfault.wake(address, bytes.len() as u64),
        });
        placed.map_err(|error| place_error(error, gpa, address))
    }

    /// Converts a back-end address to a guest-physical address.
    fn gpa(&self, address: FaultAddress) -> Option<GuestAddress> {
        self.regions.iter().find_map(|region| {
            let offset = address.0.checked_sub(region.userspace_addr)?;
            (offset < region.memory_size).then(|| GuestAddress(region.guest_phys_addr + offset))
        })
    }

    /// Converts a guest-physical address to a back-end address.
    fn address(&self, gpa: GuestAddress) -> Option<FaultAddress> {
        self.regions.iter().find_map(|region| {
            let offset = gpa.0.checked_sub(region.guest_phys_addr)?;
            (offset < region.memory_size).then(|| FaultAddress(region.userspace_addr.wrapping_add(offset)))
        })
    }
}

/// Returns the error for a page that cannot be placed. An invalid address is an error of the back-end.
fn place_error(error: io::Error, GuestAddress(gpa): GuestAddress, address: FaultAddress) -> CheckAbort {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT | Errno::EINVAL | Errno::EFAULT) => CheckAbort::Violation(format!(
            "the page {gpa:#x} cannot be placed at the reported address {address:#x} ({error})"
        )),
        Some(Errno::ESRCH) => CheckAbort::Violation("the process of the userfaultfd is gone".into()),
        _ => CheckAbort::System(error),
    }
}
