//! Shadow rings around devices of the kernel that do not log what they write (rules K4.2, K4.3).

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;

use vhost_migrate::dirty::{Log, LogQuality};
use vhost_migrate::frontend::{Device, KernelDevice, KernelOptions};
use vhost_migrate::memory::{GuestAddress, LOG_PAGE};
use vhost_migrate::shadow::ShadowDevice;

use crate::rings::{changed, harvest, snapshot};
use crate::scsi::{DATA, REQUESTS, RESPONSE, Scsi};
use crate::vsock::{Listener, RECEIVE_PAGES, Vsock};

fn shadowed(device: KernelDevice) -> Box<dyn Device> {
    assert_eq!(device.log_quality(), None);
    let device = ShadowDevice::new(Box::new(device));
    assert_eq!(device.log_quality(), Some(LogQuality::Shadowed));
    Box::new(device)
}

fn start_logging(device: &mut dyn Device) -> Arc<Log> {
    let (log, fd) = Log::create(GuestAddress(256 * LOG_PAGE)).unwrap();
    let log = Arc::new(log);
    device.start_logging(&log, fd.as_fd()).unwrap();
    log
}

/// Rule K4.2.
#[test]
fn received_data_of_vsock_is_marked_exactly() {
    let mut vsock = Vsock::with(11, shadowed);
    vsock.start_all();
    let listener = Listener::new(1240);
    let mut stream = vsock.connect(&listener);
    vsock.exchange(&listener, &mut stream, 0);
    for round in 1..20 {
        // The rings go on at their bases, whatever the kernel had not used of the shadow rings.
        vsock.stop_all();
        vsock.used.clear();
        let before = snapshot(&vsock.memory);
        let log = start_logging(&mut *vsock.device);
        vsock.start_all();
        vsock.exchange(&listener, &mut stream, round);
        vsock.stop_all();
        let marked = harvest(&log);
        let received: BTreeSet<u64> = vsock.used.iter().copied().collect();
        let used_rings: BTreeSet<u64> = vsock.rings.iter().map(|ring| ring.used_page()).collect();
        assert_eq!(marked, &received | &used_rings);
        let mut written = changed(&vsock.memory, &before);
        written.retain(|page| RECEIVE_PAGES.contains(page));
        assert_eq!(written, received);
        vsock.device.stop_logging().unwrap();
        vsock.start_all();
    }
}

/// Rule K4.3.
#[test]
fn blocks_read_from_scsi_are_marked() {
    let mut scsi = Scsi::with(KernelOptions::default(), shadowed);
    let used_page = scsi.rings[usize::from(REQUESTS)].used_page();
    for round in 1..5 {
        scsi.start();
        scsi.write_block(3, round);
        let log = start_logging(&mut *scsi.device);
        scsi.write_block(4, round);
        assert_eq!(harvest(&log), BTreeSet::from([used_page, RESPONSE]));
        assert_eq!(scsi.read_block(3), [round; 512]);
        assert_eq!(harvest(&log), BTreeSet::from([used_page, RESPONSE, DATA]));
        scsi.device.stop_logging().unwrap();
        scsi.stop();
    }
}
