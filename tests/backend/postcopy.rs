//! Guest memory that arrives page by page while a disk works in it, and what becomes of a front-end that brings none (rule P1).

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_migrate::abi::bit;
use vhost_migrate::abi::vhost_user::{Request as Code, protocol_feature};
use vhost_migrate::backend::blk::Aio;
use vhost_migrate::frontend::{BackendAddresses, Device as _, RingSetup, UserDevice, UserOptions};
use vhost_migrate::memory::{Memory, Region, Userfault, sealed_memfd};
use vhost_migrate::ring::RingBase;
use zerocopy::{FromBytes, IntoBytes};

use crate::guest::{BASIC, Guest, HIGH, REGION, Ring, begin, places};
use crate::raw::{Client, DEADLINE, NEED_REPLY, VERSION};
use crate::server::Server;

const DISK: u64 = 1 << 20;
const LENGTH: u32 = 0x3000;
const REQUESTS: u64 = 24;

fn server(change: impl FnOnce(&mut vhost_migrate::backend::blk::DiskOptions)) -> Server {
    Server::disk(DISK, |options| {
        options.postcopy = true;
        change(options);
    })
}

fn driver(server: &Server) -> UserDevice {
    let path = server.folder.path().join("socket");
    let mut options = UserOptions::default();
    options.protocol_features |= bit(protocol_feature::PAGEFAULT);
    UserDevice::connect(path, options, Instant::now() + DEADLINE).unwrap()
}

fn huge(name: &std::ffi::CStr) -> OwnedFd {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB).unwrap();
    nix::unistd::ftruncate(&fd, REGION as i64).unwrap();
    fd
}

fn memory_of(make: impl Fn() -> OwnedFd) -> Memory {
    let share = |gpa| Arc::new(Region::share(make(), gpa, REGION, 0).unwrap());
    Memory::new([share(0), share(HIGH)]).unwrap()
}

/// Brings what `from` has to where somebody waits for it.
struct Postman<'a> {
    from: &'a Memory,
    to: &'a Memory,
    /// Of this process, and the back-end's.
    own: Userfault,
    theirs: Userfault,
    stop: AtomicBool,
}

impl Postman<'_> {
    /// Serves faults until told to stop; the pages that the back-end has asked for.
    fn serve(&self, addresses: &BackendAddresses) -> BTreeSet<u64> {
        let mut asked = BTreeSet::new();
        while !self.stop.load(Ordering::Relaxed) {
            let mut fds = [&self.own, &self.theirs].map(|fault| PollFd::new(fault.as_fd(), PollFlags::POLLIN));
            poll(&mut fds, 10u8).unwrap();
            while let Some(address) = self.theirs.fault().unwrap() {
                let gpa = addresses.gpa(address).expect("a fault outside guest memory");
                asked.insert(self.bring(gpa, addresses));
            }
            while let Some(address) = self.own.fault().unwrap() {
                let region = self.to.regions().iter().find(|r| address.wrapping_sub(r.user_addr()) < r.size()).unwrap();
                self.bring(region.gpa() + (address - region.user_addr()), addresses);
            }
        }
        asked
    }

    /// The page around `gpa`.
    fn bring(&self, gpa: u64, addresses: &BackendAddresses) -> u64 {
        let region = self.to.regions().iter().find(|region| gpa.wrapping_sub(region.gpa()) < region.size()).unwrap();
        let size = region.page_size();
        let gpa = gpa / size * size;
        let mut page = vec![0; size as usize];
        self.from.read(gpa, &mut page).unwrap();
        self.own.place(region, gpa - region.gpa(), &page).unwrap();
        // Whoever waits, waits for one of the two.
        self.own.wake(region.user_addr() + gpa - region.gpa(), size).unwrap();
        self.theirs.wake(addresses.address(gpa).unwrap(), size).unwrap();
        gpa
    }
}

/// The disk serves requests that were made in `from`, in memory `to` which has nothing yet.
fn every_byte_arrives(server: &Server, to: &Memory) {
    let guest = Guest::new();
    let mut ring = Ring::new(&guest, 0, 128, BASIC);
    let heads: Vec<u16> = (0..REQUESTS)
        .map(|slot| match slot % 2 {
            0 => ring.read(&guest, slot, slot * 24, LENGTH),
            _ => ring.write(&guest, slot, 1024 + slot * 24, &[slot as u8; LENGTH as usize]),
        })
        .collect();
    let _ = ring.driver.publish();

    let mut device = driver(server);
    device.set_features(bit(vhost_migrate::abi::virtio::VIRTIO_F_VERSION_1)).unwrap();
    let (own, theirs) = (Userfault::new().unwrap(), device.postcopy_advise().unwrap());
    for region in to.regions() {
        own.register(region).unwrap();
    }
    device.postcopy_listen().unwrap();
    let postman = Postman { from: &guest.memory, to, own, theirs, stop: AtomicBool::new(false) };
    let asked = thread::scope(|scope| {
        let mut serving = None;
        let ready = |addresses| serving = Some(scope.spawn(|| (postman.serve(&addresses), addresses)));
        device.postcopy_set_memory(to, ready).unwrap();
        let eventfd = |eventfd: &nix::sys::eventfd::EventFd| Arc::new(eventfd.as_fd().try_clone_to_owned().unwrap());
        let (kick, call) = (eventfd(&ring.kick), eventfd(&ring.call));
        let layout = ring.layout;
        let (base, size) = (RingBase::split(0), layout.size);
        let setup = RingSetup {
            size,
            desc: layout.desc,
            avail: layout.avail,
            used: layout.used,
            kick,
            call,
            error: None,
            base,
        };
        device.start_ring(0, setup).unwrap();
        ring.kick.write(1).unwrap();
        let end = Instant::now() + DEADLINE;
        let mut used = [0; 2];
        while u16::from_le_bytes(used) < REQUESTS as u16 && Instant::now() < end {
            to.read(layout.used + 2, &mut used).unwrap();
        }
        let base = device.stop_ring(0);
        postman.stop.store(true, Ordering::Relaxed);
        assert_eq!(base.unwrap(), RingBase::split(REQUESTS as u16));
        let (asked, addresses) = serving.unwrap().join().unwrap();
        // The rest.
        for region in to.regions() {
            for offset in (0..region.size()).step_by(region.page_size() as usize) {
                postman.bring(region.gpa() + offset, &addresses);
            }
        }
        asked
    });
    device.postcopy_end().unwrap();
    assert!(device.postcopy_end().is_err(), "it has ended");
    for region in to.regions() {
        postman.own.unregister(region).unwrap();
    }
    let touched: BTreeSet<u64> = asked.iter().map(|gpa| gpa / to.regions()[0].page_size()).collect();
    assert!(touched.len() > 2, "hardly a page was asked for: this has tested nothing");

    // Memory is the old one with what the disk has done to it, and nothing else.
    let mut expected = guest.snapshot();
    let mut found: Vec<Vec<u8>> = to.regions().iter().map(|region| vec![0; region.size() as usize]).collect();
    for (region, found) in to.regions().iter().zip(&mut found) {
        to.read(region.gpa(), found).unwrap();
    }
    let used = ring.layout.used as usize;
    let elements = used..used + 6 + 8 * 128;
    let completed: BTreeSet<u16> = (0..REQUESTS as usize)
        .map(|n| u16::from_le_bytes(found[0][used + 4 + 8 * n..][..2].try_into().unwrap()))
        .collect();
    assert_eq!(completed, heads.into_iter().collect());
    expected[0][elements.clone()].copy_from_slice(&found[0][elements]);
    let image = std::fs::read(server.image()).unwrap();
    for slot in 0..REQUESTS {
        let (_, status, data) = places(slot);
        expected[0][status as usize] = 0;
        let on_disk = |sector: u64| &image[sector as usize * 512..][..LENGTH as usize];
        if slot % 2 == 0 {
            expected[1][(data - HIGH) as usize..][..LENGTH as usize].copy_from_slice(on_disk(slot * 24));
        } else {
            assert!(on_disk(1024 + slot * 24).iter().all(|byte| *byte == slot as u8), "write {slot}");
        }
    }
    assert!(found == expected, "memory differs");
}

#[test]
fn a_disk_works_in_memory_that_arrives_when_it_is_touched() {
    let changes: [fn(&mut vhost_migrate::backend::blk::DiskOptions); 3] =
        [|_| {}, |options| options.aio = Aio::Threads, |options| options.direct = true];
    for change in changes {
        every_byte_arrives(&server(change), &memory_of(|| sealed_memfd("guest", REGION).unwrap()));
    }
}

/// Serves `server` nothing but a postcopy whose pages never come, as far as `rings` run.
fn stuck(server: &Server) -> (Client, Guest, Ring) {
    let guest = Guest::new();
    let mut ring = Ring::new(&guest, 0, 128, BASIC);
    ring.read(&guest, 0, 0, 512);
    let _ = ring.driver.publish();
    let empty = Guest::new();
    let client = advised(server);
    assert_eq!(client.ask_number(Code::POSTCOPY_LISTEN), 0);
    client.send(Code::SET_MEM_TABLE, NEED_REPLY, &empty.table(), &empty.fds());
    assert_eq!(client.reply(Code::SET_MEM_TABLE).len(), empty.table().len());
    client.send(Code::SET_MEM_TABLE, NEED_REPLY, 0u64.as_bytes(), &[]);
    ring.set_up(&client, &empty, 0);
    ring.enable(&client, true);
    // Answered although the ring can't even be looked at.
    client.send(Code::SET_VRING_CALL, VERSION, 0u64.as_bytes(), &[ring.call.as_fd()]);
    client.barrier();
    (client, empty, ring)
}

/// A connection whose userfaultfd nobody reads.
fn advised(server: &Server) -> Client {
    let client = server.connect();
    client.tell(Code::SET_PROTOCOL_FEATURES, &client.ask_number(Code::GET_PROTOCOL_FEATURES));
    client.done(Code::SET_FEATURES, &BASIC, &[]);
    client.send(Code::POSTCOPY_ADVISE, VERSION, &[], &[]);
    let (header, payload, fd) = client.receive();
    assert_eq!((header.flags, payload.len()), (5, 0));
    // Kept open by the front-end in life: only then do threads wait for it.
    std::mem::forget(fd.unwrap());
    client
}

/// Whether the disk serves somebody else.
fn serves(server: &Server) {
    let (client, guest) = (server.connect(), Guest::new());
    begin(&client, &guest, BASIC);
    let mut ring = Ring::new(&guest, 0, 128, BASIC);
    ring.set_up(&client, &guest, 0);
    ring.enable(&client, true);
    ring.read(&guest, 0, 0, 512);
    ring.kick();
    ring.completion();
    client.ring_base(0);
}

#[test]
fn a_front_end_that_dies_in_postcopy_leaves_nobody_waiting_and_its_memory_as_it_was() {
    let server = server(|_| {});
    for _ in 0..3 {
        let (client, guest, _ring) = stuck(&server);
        drop(client);
        serves(&server);
        let unwritten = |fd: std::os::fd::BorrowedFd<'_>| nix::sys::stat::fstat(fd).unwrap().st_blocks == 0;
        assert!(guest.fds().into_iter().all(unwritten), "pages were made up");
    }
}

#[test]
fn postcopy_in_another_order_is_refused_and_the_back_end_goes_on() {
    let server = server(|_| {});
    let client = server.connect();
    let offered = client.ask_number(Code::GET_PROTOCOL_FEATURES);
    assert_eq!(offered & bit(protocol_feature::CONFIGURE_MEM_SLOTS), 0, "never both (rule M1)");
    client.tell(Code::SET_PROTOCOL_FEATURES, &offered);
    assert_eq!(client.ask_number(Code::POSTCOPY_LISTEN), 1, "without ADVISE");
    assert_eq!(client.ask_number(Code::POSTCOPY_END), 1, "without ADVISE");
    Guest::new().send_table(&client);
    drop(client);

    let client = advised(&server);
    assert_eq!(client.ask_number(Code::POSTCOPY_LISTEN), 0);
    client.send(Code::POSTCOPY_ADVISE, VERSION, &[], &[]);
    assert!(client.receive().2.is_none(), "an fd for a postcopy that has begun");
    assert_eq!(client.ask_number(Code::POSTCOPY_END), 0);
    assert_eq!(client.ask_number(Code::POSTCOPY_END), 1, "twice");
    Guest::new().send_table(&client);
    drop(client);

    // No acknowledgement, a wrong one, and another message instead.
    let guest = Guest::new();
    for (code, payload) in [(None, 0u64), (Some(Code::SET_MEM_TABLE), 1), (Some(Code::GET_FEATURES), 0)] {
        let client = advised(&server);
        assert_eq!(client.ask_number(Code::POSTCOPY_LISTEN), 0);
        let table = client.ask_with(Code::SET_MEM_TABLE, &guest.table(), &guest.fds());
        assert_ne!(table, guest.table(), "the addresses are the back-end's");
        if let Some(code) = code {
            client.send(code, VERSION, payload.as_bytes(), &[]);
            assert!(client.is_closed());
        }
        drop(client);
        serves(&server);
    }

    // Memory that can't be waited for ends the connection.
    let client = advised(&server);
    assert_eq!(client.ask_number(Code::POSTCOPY_LISTEN), 0);
    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.set_len(REGION).unwrap();
    client.send(Code::SET_MEM_TABLE, VERSION, &guest.table(), &[file.as_fd(), file.as_fd()]);
    assert!(client.is_closed());
    drop(client);
    serves(&server);
}

/// A ring in scattered pages is mapped once more, where nobody waits for pages.
#[test]
fn postcopy_is_not_offered_to_drivers_behind_an_iommu() {
    let server = server(|options| options.iommu = true);
    let client = server.connect();
    let offered = client.ask_number(Code::GET_PROTOCOL_FEATURES);
    assert_eq!(offered & bit(protocol_feature::PAGEFAULT), 0);
    assert_ne!(offered & bit(protocol_feature::CONFIGURE_MEM_SLOTS), 0, "there is nothing in their way");
    client.tell(Code::SET_PROTOCOL_FEATURES, &offered);
    client.barrier();
    let pagefault = offered | bit(protocol_feature::PAGEFAULT);
    assert_ne!(client.acknowledged(Code::SET_PROTOCOL_FEATURES, pagefault.as_bytes(), &[]), 0);
    client.send(Code::POSTCOPY_ADVISE, VERSION, &[], &[]);
    assert!(client.is_closed(), "an answer to a request that does not exist here");
    drop(client);
    serves(&server);
}

#[test]
fn a_disk_works_in_huge_pages_that_arrive_when_they_are_touched() {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    let pages: u64 = std::fs::read_to_string(POOL).unwrap().trim().parse().unwrap();
    if pages < 24 {
        std::fs::write(POOL, "24").expect("as root, or after `sysctl vm.nr_hugepages=24`");
    }
    every_byte_arrives(&server(|_| {}), &memory_of(|| huge(c"guest")));
}

#[test]
fn the_addresses_of_a_back_end_are_those_of_its_own_process() {
    let server = server(|_| {});
    let guest = Guest::new();
    let client = advised(&server);
    assert_eq!(client.ask_number(Code::POSTCOPY_LISTEN), 0);
    let reply = client.ask_with(Code::SET_MEM_TABLE, &guest.table(), &guest.fds());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    for region in reply[8..].chunks(32) {
        let address = u64::read_from_bytes(&region[16..24]).unwrap();
        assert!(maps.lines().any(|line| line.starts_with(&format!("{address:x}-"))), "{address:#x}");
    }
}
