//! Tests of this project's programs against programs of other projects: QEMU without a guest, QEMU with a real Linux
//! guest, User-mode Linux, DPDK, `qemu-storage-daemon`, rust-vmm's crates, and block devices of the kernel.
//! They need the cargo feature `peers` and what `tests/peers/install` installs. A missing peer is a failure, never a
//! skip.
//! The modules without tests contain the test environment (processes, QMP, qtest, drivers, proxy). The other modules
//! contain the tests, among them `guest_free`, `guest_free_net`, `log_bitmap`, `linux_guest`, `dpdk`, `linux_net`,
//! `linux_iommu` and `uml`.

// Everything here is test code: a failed expectation is a failed test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(missing_docs, reason = "a test target has no users")]
#![forbid(unsafe_code)]

mod backend;
mod check;
mod device_state;
mod disk_driver;
mod dpdk;
mod guest_free;
mod guest_free_net;
mod hugetlb;
mod image_formats;
mod initramfs;
mod linux_guest;
mod linux_iommu;
mod linux_net;
mod linux_whole;
mod load;
mod log_bitmap;
mod loop_device;
#[path = "../kit/message.rs"]
mod message;
mod migration;
mod process;
mod proxy;
mod qemu;
mod qsd;
mod qtest;
mod qtest_blk;
mod qtest_net;
mod qtest_virtio;
mod ram;
mod readme;
mod rust_vmm;
mod rust_vmm_disk;
mod saved;
#[path = "../kit/served.rs"]
mod served;
mod testpmd;
mod uml;
#[path = "../kit/wait.rs"]
mod wait;
