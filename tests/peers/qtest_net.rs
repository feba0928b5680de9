//! The receive queue of a virtio-net driver that uses qtest. Every buffer has a page of its own and is used once, so
//! that the page of a received frame does not change any more.

use crate::qtest::Qtest;
use crate::qtest_virtio::{AVAIL_BIT, USED_BIT, VirtioPci, descriptor};
use crate::ram::{PAGE, Ram};

/// The number of entries of the receive queue, and of frames that it can receive in total.
pub(crate) const BUFFERS: u16 = 1024;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const TRANSMIT_SIZE: u16 = 256;

const QUEUES: u64 = 32 << 20;
const QUEUE_STRIDE: u64 = 2 << 20;
const AVAIL: u64 = 0x2_0000;
const USED: u64 = 0x4_0000;
const DATA: u64 = 64 << 20;

const F_VERSION_1: u64 = 1 << 32;
const F_RING_PACKED: u64 = 1 << 34;
const WRITE: u16 = 2;

pub(crate) struct Receiver {
    packed: bool,
    ram: Ram,
}

impl Receiver {
    /// Sets up the network device in PCI slot 3 and makes all buffers available to it.
    pub(crate) fn start(qtest: &mut Qtest, ram: Ram, packed: bool) -> Receiver {
        let function = VirtioPci::find(qtest);
        function.acknowledge(qtest, F_VERSION_1 | if packed { F_RING_PACKED } else { 0 });
        for (queue, size) in [(RECEIVE, BUFFERS), (TRANSMIT, TRANSMIT_SIZE)] {
            let base = QUEUES + u64::from(queue) * QUEUE_STRIDE;
            function.enable_queue(qtest, queue, size, [base, base + AVAIL, base + USED]);
        }
        for buffer in 0..BUFFERS {
            let (number, page) = (u64::from(buffer), DATA + u64::from(buffer) * PAGE);
            let (flags, next) = if packed { (buffer, WRITE | AVAIL_BIT) } else { (WRITE, 0) };
            qtest.write(QUEUES + 16 * number, &descriptor(page, PAGE as u32, flags, next));
            if !packed {
                qtest.write(QUEUES + AVAIL + 4 + 2 * number, &buffer.to_le_bytes());
            }
        }
        if !packed {
            qtest.write(QUEUES + AVAIL + 2, &BUFFERS.to_le_bytes());
        }
        qtest.flush();
        function.driver_ok(qtest);
        function.notify(qtest, RECEIVE);
        Receiver { packed, ram }
    }

    /// The number of received frames.
    pub(crate) fn received(&self) -> u16 {
        if !self.packed {
            return self.ram.u16(QUEUES + USED + 2);
        }
        let is_used = |buffer: &u16| {
            const USED_ONCE: u16 = AVAIL_BIT | USED_BIT;
            self.ram.u16(QUEUES + 16 * u64::from(*buffer) + 14) & USED_ONCE == USED_ONCE
        };
        (0..BUFFERS).take_while(is_used).count() as u16
    }

    /// Guest memory.
    pub(crate) fn ram(&self) -> &Ram {
        &self.ram
    }
}
