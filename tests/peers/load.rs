//! A disk whose contents identify their sector and version, and a load that reads and writes it at random. The load checks
//! every byte and length, and that each request is completed exactly once.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use crate::process::{Lab, wait_for};
use crate::qtest_blk::{Done, Driver, Kind, Machine, Options, SLOT_BYTES};

pub(crate) const SECTOR: u64 = 512;
/// Number of sectors that are only read. After them, each slot of the driver has sectors of its own to write.
const READ_ONLY: u64 = (32 << 20) / SECTOR;
const PER_SLOT: u64 = (32 << 10) / SECTOR;
const SECTORS: u64 = READ_ONLY + 1024 * PER_SLOT;
const LONGEST_READ: u64 = SLOT_BYTES / SECTOR;
const LONGEST_WRITE: u64 = 8;
const SHORTEST: u64 = 3;

/// Writes the disk image: version 0 of every sector.
pub(crate) fn make_image(lab: &Lab) -> PathBuf {
    let path = lab.disk();
    let mut image = BufWriter::with_capacity(1 << 20, File::create(&path).unwrap());
    for sector in 0..SECTORS {
        image.write_all(&contents(sector, 0)).unwrap();
    }
    image.flush().unwrap();
    path
}

#[derive(Clone, Copy, Debug)]
struct Request {
    kind: Kind,
    sector: u64,
    sectors: u64,
    version: u32,
}

impl Request {
    fn bytes(&self) -> u64 {
        self.sectors * SECTOR
    }
}

/// The load: a driver, its requests in flight, and the version of every sector on the disk.
pub(crate) struct Load {
    pub(crate) driver: Driver,
    in_flight: Vec<Vec<Option<Request>>>,
    versions: Vec<u32>,
    random: u64,
    /// Number of completed and checked requests.
    pub(crate) checked: u64,
}

impl Load {
    pub(crate) fn start(machine: &mut Machine, options: Options) -> Load {
        let driver = Driver::start(machine, options);
        let in_flight = vec![vec![None; driver.slots().into()]; options.queues.into()];
        Load { driver, in_flight, versions: vec![0; SECTORS as usize], random: 0x9e37_79b9, checked: 0 }
    }

    /// Takes and checks completions, then makes up to `count` new requests per queue available.
    pub(crate) fn step(&mut self, machine: &mut Machine, count: usize) {
        self.take(machine);
        self.submit(machine, count);
    }

    /// Fills every free slot with a long read.
    pub(crate) fn flood(&mut self, machine: &mut Machine) {
        self.take(machine);
        for queue in 0..self.driver.options.queues {
            for slot in self.free(queue) {
                let sector = self.below(READ_ONLY - LONGEST_READ);
                self.request(
                    machine,
                    queue,
                    slot,
                    Request { kind: Kind::Read, sector, sectors: LONGEST_READ, version: 0 },
                );
            }
            self.driver.kick(machine, queue);
        }
    }

    /// Waits for all completions and checks them.
    pub(crate) fn drain(&mut self, machine: &mut Machine) {
        wait_for("all requests answered", || {
            self.take(machine);
            (self.outstanding() == 0).then_some(())
        });
    }

    /// Waits for `count` more completions, and makes new requests available meanwhile.
    pub(crate) fn run(&mut self, machine: &mut Machine, count: u64) {
        let goal = self.checked + count;
        wait_for("the load goes on", || {
            self.step(machine, 8);
            (self.checked >= goal).then_some(())
        });
    }

    pub(crate) fn outstanding(&self) -> u16 {
        (0..self.driver.options.queues).map(|queue| self.driver.outstanding(queue)).sum()
    }

    /// Takes completions and checks them, without a write to guest memory.
    pub(crate) fn take(&mut self, machine: &mut Machine) {
        for done in self.driver.completions(&machine.ram) {
            self.check(machine, &done);
        }
    }

    /// Makes up to `count` requests per queue available.
    pub(crate) fn submit(&mut self, machine: &mut Machine, count: usize) {
        for queue in 0..self.driver.options.queues {
            for slot in self.free(queue).into_iter().take(count) {
                let request = self.invent(queue, slot);
                self.request(machine, queue, slot, request);
            }
            self.driver.kick(machine, queue);
        }
    }

    /// The ranges of guest memory that the device writes for the requests in flight: start and length.
    pub(crate) fn device_writes(&self) -> Vec<(u64, u64)> {
        let mut ranges = Vec::new();
        for (queue, slots) in (0..).zip(&self.in_flight) {
            for (slot, request) in (0..).zip(slots) {
                let Some(request) = request else { continue };
                ranges.push((self.driver.status(queue, slot), 1));
                if request.kind == Kind::Read {
                    ranges.push((self.driver.data(queue, slot), request.bytes()));
                }
            }
        }
        ranges
    }

    fn free(&self, queue: u16) -> Vec<u16> {
        let slots = &self.in_flight[usize::from(queue)];
        (0..).zip(slots).filter(|(_, request)| request.is_none()).map(|(slot, _)| slot).collect()
    }

    fn invent(&mut self, queue: u16, slot: u16) -> Request {
        let own = READ_ONLY + (u64::from(queue) * u64::from(self.driver.slots()) + u64::from(slot)) * PER_SLOT;
        match self.below(4) {
            0 => {
                let sectors = SHORTEST + self.below(LONGEST_WRITE - SHORTEST + 1);
                let sector = own + self.below(PER_SLOT - sectors);
                let version = u32::try_from(self.below(1 << 31)).unwrap() | 1;
                Request { kind: Kind::Write, sector, sectors, version }
            }
            1 => {
                let sectors = SHORTEST + self.below(PER_SLOT - SHORTEST);
                Request { kind: Kind::Read, sector: own, sectors, version: 0 }
            }
            _ => {
                let sectors = SHORTEST + self.below(LONGEST_READ - SHORTEST + 1);
                Request { kind: Kind::Read, sector: self.below(READ_ONLY - sectors), sectors, version: 0 }
            }
        }
    }

    fn request(&mut self, machine: &mut Machine, queue: u16, slot: u16, request: Request) {
        if request.kind == Kind::Write {
            let sectors = request.sector..request.sector + request.sectors;
            let bytes: Vec<u8> = sectors.flat_map(|sector| contents(sector, request.version)).collect();
            machine.qtest.write(self.driver.data(queue, slot), &bytes);
        }
        self.driver.submit(&mut machine.qtest, queue, slot, request.kind, request.sector, request.bytes());
        self.in_flight[usize::from(queue)][usize::from(slot)] = Some(request);
    }

    fn check(&mut self, machine: &Machine, done: &Done) {
        let slot = self.in_flight.get_mut(usize::from(done.queue)).and_then(|q| q.get_mut(usize::from(done.slot)));
        let request = slot.expect("a slot of the driver").take().unwrap_or_else(|| panic!("answered twice: {done:?}"));
        assert_eq!(done.status, 0, "{request:?}: {done:?}");
        let sectors = request.sector..request.sector + request.sectors;
        match request.kind {
            Kind::Write => {
                assert_eq!(done.len, 1, "{request:?}: {done:?}");
                for sector in sectors {
                    self.versions[sector as usize] = request.version;
                }
            }
            Kind::Read => {
                assert_eq!(u64::from(done.len), request.bytes() + 1, "{request:?}: {done:?}");
                let gpa = self.driver.data(done.queue, done.slot);
                let found = machine.ram.read(gpa, request.bytes() as usize);
                for (sector, found) in sectors.zip(found.chunks(SECTOR as usize)) {
                    let version = self.versions[sector as usize];
                    assert!(
                        found == contents(sector, version),
                        "{request:?}: wrong bytes in sector {sector}, version {version}"
                    );
                }
            }
        }
        self.checked += 1;
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random = mix(self.random);
        self.random % bound
    }
}

/// The contents of a version of a sector. All words of all versions of all sectors differ, and none is zero.
fn contents(sector: u64, version: u32) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    let mut word = mix(sector << 32 | u64::from(version));
    for chunk in bytes.chunks_exact_mut(8) {
        chunk.copy_from_slice(&(word | 1).to_le_bytes());
        word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
    }
    bytes
}

fn mix(x: u64) -> u64 {
    let x = (x.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}
