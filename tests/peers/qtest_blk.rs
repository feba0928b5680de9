//! A virtio-blk driver over qtest: it sets up rings in guest memory, submits requests and takes completions. The contents
//! of requests are in `load`.

use crate::qtest::Qtest;
use crate::qtest_virtio::{AVAIL_BIT, USED_BIT, VirtioPci, descriptor};
use crate::ram::Ram;

/// Maximum number of data bytes of a request.
pub(crate) const SLOT_BYTES: u64 = 64 << 10;

/// Addresses of the parts of a queue in guest memory. The device and the driver write different pages.
const QUEUES: u64 = 32 << 20;
const QUEUE_STRIDE: u64 = 2 << 20;
const AVAIL: u64 = 0x2_0000;
const USED: u64 = 0x4_0000;
const HEADERS: u64 = 0x6_0000;
const STATUS: u64 = 0x8_0000;
const INDIRECT: u64 = 0xa_0000;
const DATA: u64 = 64 << 20;
/// Offset of the data in a page, so that the pages of a buffer must be rounded outwards for the log.
const DATA_SKEW: u64 = 512;

const DESCRIPTORS_PER_REQUEST: u16 = 4;

const F_RING_INDIRECT: u64 = 1 << 28;
const F_RING_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;
const F_RING_PACKED: u64 = 1 << 34;
const F_BLK_MQ: u64 = 1 << 12;

/// Options of the driver's rings.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Options {
    pub(crate) queues: u16,
    pub(crate) queue_size: u16,
    pub(crate) event_idx: bool,
    pub(crate) indirect: bool,
    pub(crate) packed: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
}

/// A completion: the slot that is free again, the length from the used ring and the status byte.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) queue: u16,
    pub(crate) slot: u16,
    pub(crate) len: u32,
    pub(crate) status: u8,
}

#[derive(Clone, Default)]
struct Queue {
    avail: u16,
    kicked: u16,
    used: u16,
    /// Total numbers of descriptors of a packed ring: made available, kicked, and seen used.
    positions: [u64; 3],
}

/// The state of the driver, which a real driver has in guest memory.
#[derive(Clone)]
pub(crate) struct Driver {
    pub(crate) options: Options,
    queues: Vec<Queue>,
    function: VirtioPci,
}

/// The QEMU that the driver runs on. It changes at a migration.
pub(crate) struct Machine {
    pub(crate) qtest: Qtest,
    pub(crate) ram: Ram,
}

impl Driver {
    /// Sets up the device in PCI slot 3 and starts its queues.
    pub(crate) fn start(machine: &mut Machine, options: Options) -> Driver {
        let qtest = &mut machine.qtest;
        let mut features = F_VERSION_1;
        features |= if options.event_idx { F_RING_EVENT_IDX } else { 0 };
        features |= if options.indirect { F_RING_INDIRECT } else { 0 };
        features |= if options.queues > 1 { F_BLK_MQ } else { 0 };
        features |= if options.packed { F_RING_PACKED } else { 0 };
        let function = VirtioPci::find(qtest);
        function.acknowledge(qtest, features);
        for queue in 0..options.queues {
            let base = queue_base(queue);
            if options.packed {
                qtest.write(base + AVAIL, &[0, 0, 1, 0]); // RING_EVENT_FLAGS_DISABLE
            } else if !options.event_idx {
                qtest.write(base + AVAIL, &1u16.to_le_bytes()); // VIRTQ_AVAIL_F_NO_INTERRUPT
            }
            function.enable_queue(qtest, queue, options.queue_size, [base, base + AVAIL, base + USED]);
        }
        function.driver_ok(qtest);
        Driver { options, queues: vec![Queue::default(); options.queues.into()], function }
    }

    /// Maximum number of requests of a queue.
    pub(crate) fn slots(&self) -> u16 {
        (self.options.queue_size / self.per_request()).min(self.max_slots())
    }

    /// Address of the data of a slot.
    pub(crate) fn data(&self, queue: u16, slot: u16) -> u64 {
        DATA + (u64::from(queue) * u64::from(self.max_slots()) + u64::from(slot)) * (SLOT_BYTES + 4096) + DATA_SKEW
    }

    /// Address of the status byte of a slot.
    pub(crate) fn status(&self, queue: u16, slot: u16) -> u64 {
        queue_base(queue) + STATUS + u64::from(slot)
    }

    /// Address of the used ring of a queue, or of its device event area.
    pub(crate) fn used_ring(&self, queue: u16) -> u64 {
        queue_base(queue) + USED
    }

    /// The driver's position in the completions: elements of the used ring, modulo 2^16, or descriptors of a packed ring.
    pub(crate) fn seen(&self, queue: u16) -> u64 {
        let queue = &self.queues[usize::from(queue)];
        if self.options.packed { queue.positions[2] } else { queue.used.into() }
    }

    /// The ranges of a ring that the device has written for completions after the position `since`.
    pub(crate) fn used_since(&self, queue: u16, since: u64) -> Vec<(u64, u64)> {
        let (size, seen) = (u64::from(self.options.queue_size), self.seen(queue));
        if self.options.packed {
            // The device writes only the first descriptor of a chain.
            let positions = (since..seen).step_by(self.per_request().into());
            return positions.map(|position| (queue_base(queue) + position % size * 16, 16)).collect();
        }
        let count = (seen as u16).wrapping_sub(since as u16);
        let elements = (0..u64::from(count)).map(|number| self.used_ring(queue) + 4 + 8 * ((since + number) % size));
        elements.map(|at| (at, 8)).chain([(self.used_ring(queue) + 2, 2)]).collect()
    }

    /// Address and size of the device's event word: avail_event, or the event area of a packed ring.
    pub(crate) fn device_event(&self, queue: u16) -> (u64, u64) {
        match self.options.packed {
            true => (self.used_ring(queue), 4),
            false => (self.used_ring(queue) + 4 + 8 * u64::from(self.options.queue_size), 2),
        }
    }

    /// Number of requests without a completion.
    pub(crate) fn outstanding(&self, queue: u16) -> u16 {
        let queue = &self.queues[usize::from(queue)];
        queue.avail.wrapping_sub(queue.used)
    }

    /// Makes a request of `len` bytes at `sector` available. [`Driver::kick`] notifies the device.
    pub(crate) fn submit(&mut self, qtest: &mut Qtest, queue: u16, slot: u16, kind: Kind, sector: u64, len: u64) {
        let base = queue_base(queue);
        let size = self.options.queue_size;
        let header = base + HEADERS + u64::from(slot) * 16;
        let data = self.data(queue, slot);
        let status = self.status(queue, slot);
        let mut bytes = Vec::with_capacity(16);
        bytes.extend(u32::to_le_bytes(if kind == Kind::Read { 0 } else { 1 }));
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        qtest.write(header, &bytes);
        qtest.write(status, &[0xff]);

        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        let direction = if kind == Kind::Read { WRITE } else { 0 };
        let first = len.min(1024);
        let table = [
            (header, 16, NEXT),
            (data, first, NEXT | direction),
            (data + first, len - first, NEXT | direction),
            (status, 1, WRITE),
        ];
        if self.options.packed {
            return self.submit_packed(qtest, queue, slot, &table);
        }
        let (head, at) = if self.options.indirect {
            let at = base + INDIRECT + u64::from(slot) * 64;
            qtest.write(base + u64::from(slot) * 16, &descriptor(at, 64, 4, 0));
            (slot, at)
        } else {
            let head = slot * DESCRIPTORS_PER_REQUEST;
            (head, base + u64::from(head) * 16)
        };
        let first_index = if self.options.indirect { 0 } else { head };
        let mut bytes = Vec::with_capacity(64);
        for (i, (address, len, flags)) in (1u16..).zip(table) {
            let next = if flags & NEXT == 0 { 0 } else { first_index + i };
            bytes.extend(descriptor(address, u32::try_from(len).unwrap(), flags, next));
        }
        qtest.write(at, &bytes);

        let state = &mut self.queues[usize::from(queue)];
        qtest.write(base + AVAIL + 4 + 2 * u64::from(state.avail % size), &head.to_le_bytes());
        state.avail = state.avail.wrapping_add(1);
    }

    /// Writes a request to a packed ring, with the flags of its first descriptor last.
    fn submit_packed(&mut self, qtest: &mut Qtest, queue: u16, slot: u16, table: &[(u64, u64, u16)]) {
        let base = queue_base(queue);
        let size = u64::from(self.options.queue_size);
        let indirect = base + INDIRECT + u64::from(slot) * 64;
        let of = |&(address, len, flags): &(u64, u64, u16)| (address, u32::try_from(len).unwrap(), flags);
        let descs: Vec<(u64, u32, u16)> = if self.options.indirect {
            for (at, entry) in (indirect..).step_by(16).zip(table) {
                let (address, len, flags) = of(entry);
                qtest.write(at, &descriptor(address, len, 0, flags & 2));
            }
            vec![(indirect, 64, 4)]
        } else {
            table.iter().map(of).collect()
        };
        let state = &mut self.queues[usize::from(queue)];
        for (number, (address, len, flags)) in (0..).zip(descs).collect::<Vec<_>>().into_iter().rev() {
            let position: u64 = state.positions[0] + number;
            let at = base + position % size * 16;
            let flags = flags | if round_is_odd(position, size) { USED_BIT } else { AVAIL_BIT };
            qtest.write(at, &descriptor(address, len, slot, 0)[..14]);
            qtest.write(at + 14, &flags.to_le_bytes());
        }
        state.positions[0] += u64::from(if self.options.indirect { 1 } else { DESCRIPTORS_PER_REQUEST });
        state.avail = state.avail.wrapping_add(1);
    }

    /// Publishes the avail index of a queue, and kicks if the device needs it.
    pub(crate) fn kick(&mut self, machine: &mut Machine, queue: u16) {
        let base = queue_base(queue);
        let size = u64::from(self.options.queue_size);
        let state = &mut self.queues[usize::from(queue)];
        if state.avail == state.kicked {
            return;
        }
        if !self.options.packed {
            machine.qtest.write(base + AVAIL + 2, &state.avail.to_le_bytes());
        }
        machine.qtest.flush();
        let wanted = if self.options.packed {
            let [avail, kicked, _] = state.positions;
            state.positions[1] = avail;
            let (event, flags) = (machine.ram.u16(base + USED), machine.ram.u16(base + USED + 2));
            match flags & 3 {
                1 => false,
                // Position and wrap counter of the descriptor that the device waits for.
                2 => (kicked..avail).any(|position| {
                    u64::from(event & 0x7fff) == position % size && (event >> 15 == 0) == round_is_odd(position, size)
                }),
                _ => true,
            }
        } else if self.options.event_idx {
            let event = machine.ram.u16(base + USED + 4 + 8 * size);
            state.avail.wrapping_sub(event).wrapping_sub(1) < state.avail.wrapping_sub(state.kicked)
        } else {
            machine.ram.u16(base + USED) & 1 == 0
        };
        state.kicked = state.avail;
        if wanted {
            self.function.notify(&mut machine.qtest, queue);
        }
    }

    /// Takes new completions of all rings, without a write to guest memory.
    pub(crate) fn completions(&mut self, ram: &Ram) -> Vec<Done> {
        let size = self.options.queue_size;
        let per_request = self.per_request();
        let mut all = Vec::new();
        for queue in 0..self.options.queues {
            let base = queue_base(queue);
            if self.options.packed {
                self.packed_completions(ram, queue, &mut all);
                continue;
            }
            let published = ram.u16(base + USED + 2);
            let outstanding = self.outstanding(queue);
            let state = &mut self.queues[usize::from(queue)];
            assert!(
                published.wrapping_sub(state.used) <= outstanding,
                "queue {queue}: used index {published} ran ahead"
            );
            while state.used != published {
                let element = base + USED + 4 + 8 * u64::from(state.used % size);
                let (head, len) = (ram.u32(element), ram.u32(element + 4));
                assert_eq!(head % u32::from(per_request), 0, "queue {queue}: no request has head {head}");
                let slot = u16::try_from(head / u32::from(per_request)).unwrap();
                let status = ram.read(base + STATUS + u64::from(slot), 1)[0];
                all.push(Done { queue, slot, len, status });
                state.used = state.used.wrapping_add(1);
            }
        }
        all
    }

    fn packed_completions(&mut self, ram: &Ram, queue: u16, all: &mut Vec<Done>) {
        let (base, size) = (queue_base(queue), u64::from(self.options.queue_size));
        let (per_request, slots) = (u64::from(self.per_request()), self.slots());
        while self.outstanding(queue) > 0 {
            let state = &mut self.queues[usize::from(queue)];
            let position = state.positions[2];
            let at = base + position % size * 16;
            let used = if round_is_odd(position, size) { 0 } else { AVAIL_BIT | USED_BIT };
            if ram.u16(at + 14) & (AVAIL_BIT | USED_BIT) != used {
                return;
            }
            let (slot, len) = (ram.u16(at + 12), ram.u32(at + 8));
            assert!(slot < slots, "queue {queue}: no request has id {slot}");
            let status = ram.read(base + STATUS + u64::from(slot), 1)[0];
            all.push(Done { queue, slot, len, status });
            state.positions[2] += per_request;
            state.used = state.used.wrapping_add(1);
        }
    }

    fn per_request(&self) -> u16 {
        if self.options.indirect { 1 } else { DESCRIPTORS_PER_REQUEST }
    }

    fn max_slots(&self) -> u16 {
        1024 / self.options.queues.max(1)
    }
}

fn queue_base(queue: u16) -> u64 {
    QUEUES + u64::from(queue) * QUEUE_STRIDE
}

/// Returns true if the wrap counter is 0 at a position of a packed ring. Positions are not reduced by rounds.
fn round_is_odd(position: u64, size: u64) -> bool {
    position / size % 2 == 1
}
