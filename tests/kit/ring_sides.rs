//! Both sides of a ring of either kind: each side takes exactly what the other side adds.

use std::collections::VecDeque;

use proptest::prelude::*;
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::memory::{Address, Memory};
use vhost_migrate::ring::{Buffer, Chain, DeviceRing, DriverRing, DriverRingState, PackedDevice, RingBase, RingLayout};

use crate::ring::{IN_ORDER, TABLES, buffer};

#[derive(Clone, Debug)]
pub(crate) enum Op {
    Add {
        readable: usize,
        writable: usize,
        indirect: bool,
    },
    DriverPublish,
    Pop,
    /// Completes a request: with IN_ORDER the oldest one, on a packed ring a batch of the oldest ones.
    Push(prop::sample::Index),
    DevicePublish,
    /// The device puts some of the requests back that it took last, in the right or in the reverse order.
    PutBack(prop::sample::Index, bool),
    PopUsed,
    /// The driver is restored from its saved state.
    RestoreDriver,
    /// The memory table of a split ring's device changes. A successor of a packed ring's device takes over and serves the
    /// requests in flight again.
    ReplaceDevice,
}

pub(crate) fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..4usize, 0..4usize, any::<bool>())
            .prop_map(|(readable, writable, indirect)| Op::Add { readable, writable, indirect }),
        2 => Just(Op::DriverPublish),
        4 => Just(Op::Pop),
        4 => any::<prop::sample::Index>().prop_map(Op::Push),
        2 => Just(Op::DevicePublish),
        2 => (any::<prop::sample::Index>(), any::<bool>()).prop_map(|(count, reversed)| Op::PutBack(count, reversed)),
        4 => Just(Op::PopUsed),
        1 => Just(Op::RestoreDriver),
        1 => Just(Op::ReplaceDevice),
    ]
}

#[derive(Clone, Debug, PartialEq)]
struct Request {
    head: u16,
    /// Number of the entries that it takes: 1 in the avail ring, or its descriptors in a packed ring.
    slots: u16,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
}

impl Request {
    fn of(chain: &Chain, packed: bool) -> Request {
        let Chain { head, slots, readable, writable, .. } = chain.clone();
        Request { head, slots: if packed { slots } else { 1 }, readable, writable }
    }

    fn all_written(&self) -> u32 {
        self.writable.iter().fold(0, |bytes: u32, buffer| bytes.saturating_add(buffer.len))
    }

    /// The request as far as the device names it to its ring.
    fn chain(&self) -> Chain {
        let mut chain = Chain::default();
        (chain.head, chain.slots) = (self.head, self.slots);
        chain
    }
}

/// Returns true if the device has completed all requests that it has taken.
fn is_idle(device: &DeviceRing) -> bool {
    match device {
        DeviceRing::Split(ring) => ring.next_avail() == ring.used_index(),
        DeviceRing::Packed(ring) => ring.avail_position() == ring.used_position(),
    }
}

/// Executes `ops` on both sides of an empty ring.
pub(crate) fn exchange(
    memory: &Memory,
    layout: RingLayout,
    features: VirtioFeatures,
    (mut driver, mut device): (DriverRing, DeviceRing),
    ops: Vec<Op>,
) -> Result<(), TestCaseError> {
    let (packed, in_order) = (matches!(layout, RingLayout::Packed(_)), features.contains(IN_ORDER));
    let size = layout.size();
    let (mut made, mut visible) = (VecDeque::new(), 0);
    // With the copies of its descriptors in a packed ring, and the total number of entries taken before it.
    let mut held: Vec<(Request, Vec<_>, u64)> = Vec::new();
    let (mut taken, mut used) = (0u64, 0u64);
    let (mut done, mut done_visible) = (VecDeque::new(), 0);
    let mut chain = Chain::default();
    let mut serial = 0u32;
    for op in ops {
        match op {
            Op::Add { readable, writable, indirect } => {
                let mut buffers = |count: usize| -> Vec<Buffer> {
                    let next = || {
                        serial += 1;
                        buffer(u64::from(serial) << 33, serial)
                    };
                    std::iter::repeat_with(next).take(count).collect()
                };
                let (readable, writable) = (buffers(readable), buffers(writable));
                let count = readable.len() + writable.len();
                let table = indirect.then_some(TABLES.unchecked_add(u64::from(serial) % 8192 * 128));
                let needed = if indirect { 1 } else { count };
                let free = usize::from(driver.free());
                match driver.add(&readable, &writable, table) {
                    Ok(Some(head)) => {
                        prop_assert!(count > 0 && needed <= free);
                        prop_assert_eq!(usize::from(driver.free()), free - needed);
                        let slots = if packed { needed as u16 } else { 1 };
                        made.push_back(Request { head, slots, readable, writable });
                    }
                    Ok(None) => prop_assert!(needed > free),
                    Err(e) => prop_assert!(count == 0 || needed > size.into(), "{}", e),
                }
            }
            Op::DriverPublish => {
                let _ = driver.publish();
                visible = made.len();
            }
            Op::Pop => {
                prop_assert_eq!(device.pop(&mut chain).unwrap(), visible > 0);
                if visible > 0 {
                    visible -= 1;
                    let request = made.pop_front().unwrap();
                    prop_assert_eq!(&Request::of(&chain, packed), &request);
                    let slots = u64::from(request.slots);
                    let mut descs = Vec::new();
                    if let DeviceRing::Packed(ring) = &device {
                        descs = ring.descs().to_vec();
                        prop_assert_eq!(descs.len() as u64, slots);
                    }
                    held.push((request, descs, taken));
                    taken += slots;
                }
            }
            Op::Push(pick) if !held.is_empty() => {
                let pick = pick.index(held.len());
                let range = match (in_order, packed) {
                    (false, _) => pick..=pick,
                    (true, false) => 0..=0,
                    (true, true) => 0..=pick,
                };
                let batch: Vec<Request> = held.drain(range).map(|(request, ..)| request).collect();
                serial += 1;
                let len = if !in_order && serial.is_multiple_of(3) { 0 } else { serial };
                let (last, before) = batch.split_last().unwrap();
                let slots = batch.iter().map(|request| request.slots).sum();
                device.push(&Request { slots, ..last.clone() }.chain(), len);
                used += u64::from(slots);
                done.extend(before.iter().map(|request| (request.head, request.all_written())));
                done.push_back((last.head, len));
            }
            Op::Push(_) => {}
            Op::DevicePublish => {
                let _ = device.publish();
                done_visible = done.len();
            }
            Op::PutBack(count, reversed) => {
                let count = count.index(held.len() + 1);
                let last = held.split_off(held.len() - count);
                let chains: Vec<Chain> = last.iter().map(|(request, ..)| request.chain()).collect();
                let mut chains: Vec<&Chain> = chains.iter().collect();
                if reversed {
                    chains.reverse();
                }
                let slots: u64 = last.iter().map(|(of, ..)| u64::from(of.slots)).sum();
                let first = last.first().map_or(taken, |(.., before)| *before);
                // Possible if none of them is completed and, on a packed ring, no completion has overwritten them.
                let possible = first + slots == taken && (!packed || first >= used) && !(reversed && count > 1);
                let before = device.base();
                prop_assert_eq!(device.put_back(&chains), possible);
                if possible {
                    taken = first;
                    visible += count;
                    last.into_iter().rev().for_each(|(request, ..)| made.push_front(request));
                } else {
                    prop_assert_eq!(device.base(), before);
                    held.extend(last);
                }
            }
            Op::PopUsed => match driver.pop_used().unwrap() {
                Some(used) => {
                    prop_assert!(done_visible > 0);
                    done_visible -= 1;
                    prop_assert_eq!((used.head, used.len), done.pop_front().unwrap());
                }
                None => prop_assert_eq!(done_visible, 0),
            },
            Op::RestoreDriver => {
                let state = serde_json::to_vec(&driver.state()).unwrap();
                let state: DriverRingState = serde_json::from_slice(&state).unwrap();
                driver = DriverRing::restore(memory, layout, features, &state).unwrap();
                prop_assert_eq!(driver.state(), state);
            }
            Op::ReplaceDevice => match (&mut device, layout) {
                (DeviceRing::Split(ring), RingLayout::Split(layout)) => ring.remap(memory, layout).unwrap(),
                (DeviceRing::Packed(ring), RingLayout::Packed(layout)) => {
                    let _ = ring.publish();
                    done_visible = done.len();
                    let positions = (ring.avail_position(), ring.used_position());
                    *ring = PackedDevice::new(memory, layout, features, RingBase::PACKED_START).unwrap();
                    ring.set_positions(positions.0, positions.1).unwrap();
                    prop_assert_eq!((ring.avail_position(), ring.used_position()), positions);
                    for (request, descs, _) in &held {
                        ring.resubmit(descs, &mut chain).unwrap();
                        prop_assert_eq!(&Request::of(&chain, true), request);
                    }
                }
                _ => panic!("the layout is one of the other kind of ring"),
            },
        }
    }
    let _ = driver.publish();
    held.iter().for_each(|(request, ..)| device.push(&request.chain(), 0));
    while device.pop(&mut chain).unwrap() {
        device.push(&chain, 0);
    }
    let _ = device.publish();
    prop_assert!(is_idle(&device));
    while driver.pop_used().unwrap().is_some() {}
    prop_assert_eq!((driver.free(), driver.outstanding()), (size, 0));
    Ok(())
}
