//! States of the built-in guest and its devices, as they travel in a stream.

use vhost_migrate::abi::vhost_user::DiskGeneration;
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::frontend::InflightState;
use vhost_migrate::guest::{GuestConfig, GuestState};
use vhost_migrate::record::{MAX_STATE, decode, encode};
use vhost_migrate::ring::{
    DriverRingState, InOrderState, PackedDriverRequest, PackedDriverState, Position, RingBase, SplitDriverState,
    UsedBuffer,
};
use vhost_migrate::unstable::guest::{
    BlkDriverState, CpuState, DeviceSetup, DeviceState, DiskGenerations, DiskIdentities, RequestKind, RequestState,
    RetainedState, STATE_VERSION, SavedGuest, SlotState, Timestamp, decode_guest_state, decode_saved_disks,
};

use crate::{read, write};

const LIVE: &str = "guest-state-1";
const SAVED: &str = "guest-state-2";
const DEVICES: &str = "devices-1";
const DEVICES_AND_IDENTITIES: &str = "devices-2";

fn config() -> GuestConfig {
    GuestConfig::new(1 << 30)
        .with_high(1 << 28)
        .with_prefault(true)
        .with_cpus(2)
        .with_working_set(3 << 20)
        .with_cold(5 << 20)
        .with_dirty_rate(7)
        .with_repeated(4)
        .with_disks(2)
        .with_queues(3)
        .with_queue_size(128)
        .with_packed(false)
        .with_inflight_migration(true)
        .with_depth(16)
        .with_request_rate(Some(1000))
        .with_disk_area(1 << 24)
        .with_blank_disks(true)
        .with_request_timeout(60)
        .with_reconnect_timeout(None)
        .with_seed(0x0123_4567_89ab_cdef)
}

fn devices() -> Vec<DeviceState> {
    let disk = DeviceState {
        features: VirtioFeatures::from_bits_retain(1 << 32 | 1 << 26 | 1 << 6),
        capacity: 1 << 30,
        segments: 126,
        block_size: 512,
        bases: vec![RingBase::split(7), RingBase::split(0)],
        inflight: Some(InflightState { queues: 1, queue_size: 2, contents: vec![1, 2, 3] }),
        backend_state: Some(b"state of the device".to_vec()),
        reconnects: 2,
        resubmitted: 9,
    };
    vec![disk, DeviceState { bases: vec![RingBase::PACKED_START], ..DeviceState::default() }]
}

fn driver(ring: DriverRingState) -> BlkDriverState {
    BlkDriverState {
        ring,
        first_sector: 2048,
        versions: vec![0, 1, 5],
        next_version: 6,
        random: 11,
        slots: vec![
            SlotState {
                request: Some(RequestState { head: 3, kind: RequestKind::Write, sector: 8, sectors: 2, offset: 512 }),
                retained: None,
            },
            SlotState { request: None, retained: Some(RetainedState { sector: 1, offset: 0, versions: vec![1, 5] }) },
        ],
        requests: 20,
        completions: 19,
    }
}

fn guest() -> GuestState {
    let split = SplitDriverState {
        avail: 20,
        published: 20,
        used: 19,
        chains: vec![vec![3, 4, 5]],
        first_free: 6,
        in_order: Some(InOrderState { queue: [(3, 1)].into(), batch: Some(UsedBuffer { head: 3, len: 1 }) }),
    };
    let at = |index, wrap| Position { index, wrap };
    let packed = PackedDriverState {
        avail: at(4, false),
        published: at(4, false),
        used: at(1, true),
        requests: vec![PackedDriverRequest { id: 3, slots: 3 }],
        held: 0x1234,
        in_order: None,
    };
    GuestState {
        version: STATE_VERSION,
        config: config().into(),
        cpus: vec![CpuState { steps: 5 }, CpuState { steps: 6 }],
        drivers: vec![driver(DriverRingState::Split(split)), driver(DriverRingState::Packed(packed))],
        devices: devices(),
        last_action: Some(Timestamp { boot: "a boot".into(), monotonic_ns: 1, realtime_ns: 2 }),
    }
}

fn generations() -> DiskGenerations {
    vec![Some(DiskGeneration { identity: 1 << 100, generation: 3 }), None]
}

fn identities() -> DiskIdentities {
    vec![Some(1 << 100), None]
}

fn setup() -> DeviceSetup {
    DeviceSetup { version: STATE_VERSION, config: config().into(), devices: devices() }
}

#[test]
fn states_of_the_built_in_guest_are_read() {
    assert_eq!(decode_guest_state(&read(LIVE)).unwrap(), (guest(), None));
    assert_eq!(decode_guest_state(&read(SAVED)).unwrap(), (guest(), Some(generations())));
    assert_eq!(decode_saved_disks(&read(SAVED)), Some(generations()));
}

#[test]
fn descriptions_of_devices_are_read() {
    assert_eq!(decode::<DeviceSetup>("devices", 1, &read(DEVICES), MAX_STATE).unwrap(), setup());
    let described: (DeviceSetup, DiskIdentities) =
        decode("devices", 2, &read(DEVICES_AND_IDENTITIES), MAX_STATE).unwrap();
    assert_eq!(described, (setup(), identities()));
}

#[test]
#[ignore = "writes the files"]
fn write_files() {
    write(LIVE, &encode(1, &guest()).unwrap());
    write(SAVED, &encode(2, &SavedGuest { disks: generations(), guest: guest() }).unwrap());
    write(DEVICES, &encode(1, &setup()).unwrap());
    write(DEVICES_AND_IDENTITIES, &encode(2, &(setup(), identities())).unwrap());
}
