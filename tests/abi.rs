//! Comparison of the numbers and layouts of `src/abi` with those of the system's kernel headers, by a C compiler.
//!
//! `items` is the only table. A structure's line that does not name each field does not compile. A constant or
//! structure that is missing from the table fails `every_number_and_structure_is_compared`. A number of the headers
//! that `src/abi` lacks fails `every_number_of_the_headers_is_in_src_abi`.
#![allow(clippy::unwrap_used, clippy::panic)] // also in the helpers of these tests

use bitflags::Flags;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Output};
use vhost_migrate::abi::vhost::{VHOST_VRING_F_LOG, VringAddrFlags};
use vhost_migrate::abi::vhost_user::{BackendRequest, FrontendRequest, Header, ProtocolFeatures};
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::abi::{vduse, vhost, virtio};
use zerocopy::{FromBytes, IntoBytes};

/// A number of `src/abi` and the C expression for the same number.
struct Item {
    /// Name of the constant or structure in `src/abi`.
    name: &'static str,
    c: String,
    /// True if the headers must have it, because the oldest headers that this crate follows have it.
    required: bool,
    /// Macro that is defined if the headers have it.
    guard: String,
    ours: i64,
}

/// Conversion of a constant of `src/abi` to the number that C has.
trait Number {
    fn number(self) -> i64;
}

macro_rules! numbers {
    ($($integer:ty),*) => { $(impl Number for $integer { fn number(self) -> i64 { self as i64 } })* };
}
numbers!(i32, u8, u16, u32, u64, usize);

/// The C constants are bit numbers, not masks.
impl Number for VringAddrFlags {
    fn number(self) -> i64 {
        self.bits().trailing_zeros().into()
    }
}

impl Number for VirtioFeatures {
    fn number(self) -> i64 {
        self.bits().trailing_zeros().into()
    }
}

/// Fills a vector of [`Item`]s; `items` shows its lines.
macro_rules! table {
    ($items:ident) => {};
    // Constants: `required`, or `newer` if the system's headers may lack them. The C name is the prefix and the name.
    ($items:ident constants $need:ident $module:ident $prefix:literal { $($name:ident),* $(,)? } $($rest:tt)*) => {
        $($items.push(Item {
            name: stringify!($name),
            c: format!("{}{}", $prefix, stringify!($name)),
            required: stringify!($need) == "required",
            guard: format!("{}{}", $prefix, stringify!($name)),
            ours: Number::number($module::$name),
        });)*
        table!($items $($rest)*);
    };
    // A constant that is an expression in C, or whose name is no macro, which #ifdef could test.
    ($items:ident constant $need:ident $module:ident $name:ident = $c:literal if $guard:ident; $($rest:tt)*) => {
        $items.push(Item {
            name: stringify!($name),
            c: $c.to_owned(),
            required: stringify!($need) == "required",
            guard: stringify!($guard).to_owned(),
            ours: Number::number($module::$name),
        });
        table!($items $($rest)*);
    };
    // A structure: `whole`, or `head` if it is longer in newer headers. A field is `name`, `name: c_name`, or
    // `name: -` if not all headers have it.
    (
        $items:ident $extent:ident $need:ident $module:ident $name:ident = $c:literal if $guard:ident {
            $($field:ident $(: $cfield:tt)?),* $(,)?
        } $($rest:tt)*
    ) => {
        let _every_field_is_named = |whole: $module::$name| { let $module::$name { $($field: _),* } = whole; };
        let mut push = |c: String, ours: usize| $items.push(Item {
            name: stringify!($name),
            c,
            required: stringify!($need) == "required",
            guard: stringify!($guard).to_owned(),
            ours: ours as i64,
        });
        if stringify!($extent) == "whole" {
            push(format!("sizeof({})", $c), size_of::<$module::$name>());
        }
        $(
            let field = [$(stringify!($cfield),)? stringify!($field)][0];
            if field != "-" {
                push(format!("offsetof({}, {field})", $c), std::mem::offset_of!($module::$name, $field));
            }
        )*
        table!($items $($rest)*);
    };
}

fn items() -> Vec<Item> {
    let mut items = Vec::new();
    table! { items
        constants required vhost "" {
            VHOST_VIRTIO, VHOST_PAGE_SIZE, VHOST_F_LOG_ALL, VHOST_NET_F_VIRTIO_NET_HDR,
            VHOST_VRING_F_LOG, VHOST_VRING_LITTLE_ENDIAN, VHOST_VRING_BIG_ENDIAN, VHOST_ACCESS_RO,
            VHOST_ACCESS_WO, VHOST_ACCESS_RW, VHOST_IOTLB_MISS, VHOST_IOTLB_UPDATE,
            VHOST_IOTLB_INVALIDATE, VHOST_IOTLB_ACCESS_FAIL, VHOST_IOTLB_MSG, VHOST_IOTLB_MSG_V2,
            VHOST_BACKEND_F_IOTLB_MSG_V2, VHOST_GET_FEATURES, VHOST_SET_FEATURES, VHOST_SET_OWNER,
            VHOST_RESET_OWNER, VHOST_SET_MEM_TABLE, VHOST_SET_LOG_BASE, VHOST_SET_LOG_FD,
            VHOST_SET_VRING_NUM, VHOST_SET_VRING_ADDR, VHOST_SET_VRING_BASE, VHOST_GET_VRING_BASE,
            VHOST_SET_VRING_ENDIAN, VHOST_GET_VRING_ENDIAN, VHOST_SET_VRING_KICK,
            VHOST_SET_VRING_CALL, VHOST_SET_VRING_ERR, VHOST_SET_VRING_BUSYLOOP_TIMEOUT,
            VHOST_GET_VRING_BUSYLOOP_TIMEOUT, VHOST_SET_BACKEND_FEATURES,
            VHOST_GET_BACKEND_FEATURES, VHOST_NET_SET_BACKEND, VHOST_SCSI_ABI_VERSION,
            VHOST_SCSI_SET_ENDPOINT, VHOST_SCSI_CLEAR_ENDPOINT, VHOST_SCSI_GET_ABI_VERSION,
            VHOST_SCSI_SET_EVENTS_MISSED, VHOST_SCSI_GET_EVENTS_MISSED, VHOST_VSOCK_SET_GUEST_CID,
            VHOST_VSOCK_SET_RUNNING,
        }
        constants newer vhost "" {
            VHOST_FILE_UNBIND, VHOST_IOTLB_BATCH_BEGIN, VHOST_IOTLB_BATCH_END,
            VHOST_BACKEND_F_IOTLB_BATCH, VHOST_BACKEND_F_IOTLB_ASID, VHOST_BACKEND_F_SUSPEND,
            VHOST_VDPA_GET_DEVICE_ID, VHOST_VDPA_GET_STATUS, VHOST_VDPA_SET_STATUS,
            VHOST_VDPA_GET_CONFIG, VHOST_VDPA_SET_CONFIG, VHOST_VDPA_SET_VRING_ENABLE,
            VHOST_VDPA_GET_VRING_NUM, VHOST_VDPA_SET_CONFIG_CALL, VHOST_VDPA_GET_IOVA_RANGE,
            VHOST_VDPA_GET_CONFIG_SIZE, VHOST_VDPA_GET_AS_NUM, VHOST_VDPA_GET_VRING_GROUP,
            VHOST_VDPA_SET_GROUP_ASID, VHOST_VDPA_SUSPEND, VHOST_VDPA_GET_VQS_COUNT,
            VHOST_VDPA_GET_GROUP_NUM, VHOST_BACKEND_F_RESUME,
            VHOST_BACKEND_F_ENABLE_AFTER_DRIVER_OK, VHOST_BACKEND_F_DESC_ASID,
            VHOST_BACKEND_F_IOTLB_PERSIST, VHOST_NEW_WORKER, VHOST_FREE_WORKER,
            VHOST_ATTACH_VRING_WORKER, VHOST_GET_VRING_WORKER, VHOST_VDPA_RESUME,
            VHOST_VDPA_GET_VRING_DESC_GROUP, VHOST_VDPA_GET_VRING_SIZE, VHOST_GET_FEATURES_ARRAY,
            VHOST_SET_FEATURES_ARRAY, VHOST_FORK_OWNER_KTHREAD, VHOST_FORK_OWNER_TASK,
            VHOST_SET_FORK_FROM_OWNER, VHOST_GET_FORK_FROM_OWNER,
        }
        whole required vhost VringState = "struct vhost_vring_state" if VHOST_VIRTIO { index, num }
        whole required vhost VringFile = "struct vhost_vring_file" if VHOST_VIRTIO { index, fd }
        whole required vhost VringAddr = "struct vhost_vring_addr" if VHOST_VIRTIO {
            index, flags, desc_user_addr, used_user_addr, avail_user_addr, log_guest_addr,
        }
        whole required vhost IotlbMsg = "struct vhost_iotlb_msg" if VHOST_VIRTIO {
            iova, size, uaddr, perm, kind: type, padding: -,
        }
        whole required vhost Msg = "struct vhost_msg" if VHOST_VIRTIO { kind: type, padding: -, iotlb, unused: - }
        whole required vhost MsgV2 = "struct vhost_msg_v2" if VHOST_VIRTIO { kind: type, asid: -, iotlb, unused: - }
        whole required vhost VhostMemoryRegion = "struct vhost_memory_region" if VHOST_VIRTIO {
            guest_phys_addr, memory_size, userspace_addr, flags_padding,
        }
        whole required vhost VhostMemoryHeader = "struct vhost_memory" if VHOST_VIRTIO { nregions, padding }
        whole required vhost ScsiTarget = "struct vhost_scsi_target" if VHOST_VIRTIO {
            abi_version, vhost_wwpn, vhost_tpgt, reserved,
        }
        whole newer vhost VdpaConfigHeader = "struct vhost_vdpa_config" if VHOST_VDPA_GET_CONFIG { off, len }
        whole newer vhost VdpaIovaRange = "struct vhost_vdpa_iova_range" if VHOST_VDPA_GET_IOVA_RANGE { first, last }
        whole newer vhost WorkerState = "struct vhost_worker_state" if VHOST_NEW_WORKER { worker_id }
        whole newer vhost VringWorker = "struct vhost_vring_worker" if VHOST_NEW_WORKER { index, worker_id }
        whole newer vhost FeaturesArrayHeader = "struct vhost_features_array" if VHOST_GET_FEATURES_ARRAY { count }

        constants required vduse "" {
            VDUSE_BASE, VDUSE_API_VERSION, VDUSE_NAME_MAX, VDUSE_EVENTFD_DEASSIGN,
            VDUSE_ACCESS_RO, VDUSE_ACCESS_WO, VDUSE_ACCESS_RW, VDUSE_IOVA_CAP_UMEM,
            VDUSE_REQ_RESULT_OK, VDUSE_REQ_RESULT_FAILED, VDUSE_GET_API_VERSION,
            VDUSE_SET_API_VERSION, VDUSE_CREATE_DEV, VDUSE_DESTROY_DEV, VDUSE_IOTLB_GET_FD,
            VDUSE_DEV_GET_FEATURES, VDUSE_DEV_SET_CONFIG, VDUSE_DEV_INJECT_CONFIG_IRQ,
            VDUSE_VQ_SETUP, VDUSE_VQ_GET_INFO, VDUSE_VQ_SETUP_KICKFD, VDUSE_VQ_INJECT_IRQ,
            VDUSE_IOTLB_REG_UMEM, VDUSE_IOTLB_DEREG_UMEM, VDUSE_IOTLB_GET_INFO,
        }
        constants newer vduse "" {
            VDUSE_API_VERSION_1, VDUSE_F_QUEUE_READY, VDUSE_F_SUSPEND, VDUSE_GET_FEATURES,
            VDUSE_SET_FEATURES, VDUSE_IOTLB_GET_FD2,
        }
        constant required vduse VDUSE_GET_VQ_STATE = "VDUSE_GET_VQ_STATE" if VDUSE_BASE;
        constant required vduse VDUSE_SET_STATUS = "VDUSE_SET_STATUS" if VDUSE_BASE;
        constant required vduse VDUSE_UPDATE_IOTLB = "VDUSE_UPDATE_IOTLB" if VDUSE_BASE;
        constant newer vduse VDUSE_SET_VQ_GROUP_ASID = "VDUSE_SET_VQ_GROUP_ASID" if VDUSE_API_VERSION_1;
        constant newer vduse VDUSE_SET_VQ_READY = "VDUSE_SET_VQ_READY" if VDUSE_F_QUEUE_READY;
        constant newer vduse VDUSE_SUSPEND = "VDUSE_SUSPEND" if VDUSE_F_SUSPEND;
        whole required vduse DevConfigHeader = "struct vduse_dev_config" if VDUSE_BASE {
            name, vendor_id, device_id, features, vq_num, vq_align, reserved: -, config_size,
        }
        whole required vduse IotlbEntry = "struct vduse_iotlb_entry" if VDUSE_BASE {
            offset, start, last, perm, padding: -,
        }
        whole required vduse ConfigDataHeader = "struct vduse_config_data" if VDUSE_BASE { offset, length }
        whole required vduse VqConfig = "struct vduse_vq_config" if VDUSE_BASE { index, max_size, reserved: - }
        whole required vduse VqStateSplit = "struct vduse_vq_state_split" if VDUSE_BASE { avail_index }
        whole required vduse VqStatePacked = "struct vduse_vq_state_packed" if VDUSE_BASE {
            last_avail_counter, last_avail_idx, last_used_counter, last_used_idx,
        }
        whole required vduse VqInfo = "struct vduse_vq_info" if VDUSE_BASE {
            index, num, desc_addr, driver_addr, device_addr, state: packed, ready, padding: -,
        }
        whole required vduse VqEventfd = "struct vduse_vq_eventfd" if VDUSE_BASE { index, fd }
        whole required vduse IovaUmem = "struct vduse_iova_umem" if VDUSE_BASE { uaddr, iova, size, reserved: - }
        whole required vduse IovaInfo = "struct vduse_iova_info" if VDUSE_BASE { start, last, capability, reserved: - }
        whole required vduse VqState = "struct vduse_vq_state" if VDUSE_BASE { index, state: split }
        whole required vduse DevStatus = "struct vduse_dev_status" if VDUSE_BASE { status }
        whole required vduse IovaRange = "struct vduse_iova_range" if VDUSE_BASE { start, last }
        whole required vduse DevRequest = "struct vduse_dev_request" if VDUSE_BASE {
            kind: type, request_id, reserved, payload: padding,
        }
        whole required vduse DevResponse = "struct vduse_dev_response" if VDUSE_BASE {
            request_id, result, reserved, payload: padding,
        }
        whole newer vduse VqReady = "struct vduse_vq_ready" if VDUSE_F_QUEUE_READY { index: num, ready }
        whole newer vduse IotlbEntryV2 = "struct vduse_iotlb_entry_v2" if VDUSE_IOTLB_GET_FD2 {
            v1: -, asid, reserved: -,
        }

        constants required virtio "VRING_" {
            DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT, USED_F_NO_NOTIFY, AVAIL_F_NO_INTERRUPT,
            DESC_ALIGN_SIZE, AVAIL_ALIGN_SIZE, USED_ALIGN_SIZE, PACKED_DESC_F_AVAIL,
            PACKED_DESC_F_USED, PACKED_EVENT_FLAG_ENABLE, PACKED_EVENT_FLAG_DISABLE,
            PACKED_EVENT_FLAG_DESC, PACKED_EVENT_F_WRAP_CTR,
        }
        constants required virtio "" {
            VIRTIO_F_NOTIFY_ON_EMPTY, VIRTIO_F_ANY_LAYOUT, VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX, VIRTIO_F_VERSION_1, VIRTIO_F_ACCESS_PLATFORM,
            VIRTIO_F_RING_PACKED, VIRTIO_F_IN_ORDER, VIRTIO_F_ORDER_PLATFORM, VIRTIO_F_SR_IOV,
            VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
            VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_CONFIG_S_FAILED,
            VIRTIO_ID_NET, VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_RNG, VIRTIO_ID_BALLOON,
            VIRTIO_ID_SCSI, VIRTIO_ID_9P, VIRTIO_ID_GPU, VIRTIO_ID_INPUT, VIRTIO_ID_VSOCK,
            VIRTIO_ID_CRYPTO, VIRTIO_ID_IOMMU, VIRTIO_ID_MEM, VIRTIO_ID_SOUND, VIRTIO_ID_FS,
            VIRTIO_ID_PMEM, VIRTIO_BLK_F_BARRIER, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_SCSI,
            VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_MQ,
            VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
            VIRTIO_BLK_T_SCSI_CMD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_DISCARD,
            VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_T_BARRIER, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR,
            VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
            VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
            VIRTIO_NET_F_MTU, VIRTIO_NET_F_MAC, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_UFO,
            VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_RX_EXTRA,
            VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_MAC_ADDR,
            VIRTIO_NET_F_SPEED_DUPLEX, VIRTIO_NET_S_LINK_UP, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_OK,
            VIRTIO_NET_ERR, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC,
            VIRTIO_NET_CTRL_RX_ALLMULTI,
            VIRTIO_NET_CTRL_RX_ALLUNI, VIRTIO_NET_CTRL_RX_NOMULTI, VIRTIO_NET_CTRL_RX_NOUNI, VIRTIO_NET_CTRL_RX_NOBCAST,
            VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET,
            VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD,
            VIRTIO_NET_CTRL_VLAN_DEL, VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK,
            VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
        }
        constants newer virtio "" {
            VIRTIO_BLK_F_SECURE_ERASE, VIRTIO_BLK_T_SECURE_ERASE, VIRTIO_F_NOTIFICATION_DATA,
            VIRTIO_F_RING_RESET,
        }
        constant required virtio RING_FLAGS_OFFSET = "offsetof(struct vring_avail, flags)" if VRING_DESC_F_NEXT;
        constant required virtio RING_FLAGS_OFFSET = "offsetof(struct vring_used, flags)" if VRING_DESC_F_NEXT;
        constant required virtio RING_IDX_OFFSET = "offsetof(struct vring_avail, idx)" if VRING_DESC_F_NEXT;
        constant required virtio RING_IDX_OFFSET = "offsetof(struct vring_used, idx)" if VRING_DESC_F_NEXT;
        constant required virtio RING_ELEMENTS_OFFSET = "offsetof(struct vring_avail, ring)" if VRING_DESC_F_NEXT;
        constant required virtio RING_ELEMENTS_OFFSET = "offsetof(struct vring_used, ring)" if VRING_DESC_F_NEXT;
        whole required virtio Desc = "struct vring_desc" if VRING_DESC_F_NEXT { addr, len, flags, next }
        whole required virtio UsedElem = "struct vring_used_elem" if VRING_DESC_F_NEXT { id, len }
        whole required virtio PackedDesc = "struct vring_packed_desc" if VRING_PACKED_DESC_F_AVAIL {
            addr, len, id, flags,
        }
        whole required virtio PackedEvent = "struct vring_packed_desc_event" if VRING_PACKED_DESC_F_AVAIL {
            off_wrap, flags,
        }
        whole required virtio BlkGeometry = "struct virtio_blk_geometry" if VIRTIO_BLK_F_MQ {
            cylinders, heads, sectors,
        }
        head newer virtio BlkConfig = "struct virtio_blk_config" if VIRTIO_BLK_F_SECURE_ERASE {
            capacity, size_max, seg_max, geometry, blk_size, physical_block_exp, alignment_offset, min_io_size,
            opt_io_size, wce, unused, num_queues, max_discard_sectors, max_discard_seg, discard_sector_alignment,
            max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap, unused1, max_secure_erase_sectors,
            max_secure_erase_seg, secure_erase_sector_alignment,
        }
        whole required virtio BlkRequestHeader = "struct virtio_blk_outhdr" if VIRTIO_BLK_F_MQ {
            request_type: type, ioprio, sector,
        }
        whole required virtio BlkDiscardWriteZeroes = "struct virtio_blk_discard_write_zeroes" if VIRTIO_BLK_F_DISCARD {
            sector, num_sectors, flags,
        }
        head newer virtio NetConfig = "struct virtio_net_config" if VIRTIO_NET_F_RSS {
            mac, status, max_virtqueue_pairs, mtu, speed, duplex, rss_max_key_size, rss_max_indirection_table_length,
            supported_hash_types,
        }
        whole required virtio NetHeader = "struct virtio_net_hdr_v1" if VIRTIO_NET_F_MQ {
            flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers,
        }
        whole required virtio NetCtrlHeader = "struct virtio_net_ctrl_hdr" if VIRTIO_NET_F_MQ { class, cmd }
    }
    items
}

/// Numbers that no header has: conveniences, and numbers that only old headers had.
const NOT_IN_HEADERS: [&str; 3] = ["VHOST_GET_BACKEND_FEATURES_OLD", "MAX_QUEUE_SIZE", "SECTOR_BYTES"];

const HEADERS: [&str; 8] = [
    "linux/version.h",
    "linux/vhost.h",
    "linux/vduse.h",
    "linux/virtio_ring.h",
    "linux/virtio_blk.h",
    "linux/virtio_net.h",
    "linux/virtio_config.h",
    "linux/virtio_ids.h",
];

#[test]
fn every_number_size_and_offset_equals_that_of_the_systems_headers() {
    let items = items();
    let mut source = includes();
    source.push_str("#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n");
    for (number, Item { c, guard, .. }) in items.iter().enumerate() {
        source.push_str(&format!("#ifdef {guard}\nprintf(\"{number} %lld\\n\", (long long)({c}));\n#endif\n"));
    }
    source.push_str("return 0;\n}\n");

    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("abi");
    cc(&source, folder.path(), &["-o", program.to_str().unwrap()]);
    let theirs: BTreeMap<usize, i64> = text(&Command::new(&program).output().unwrap())
        .lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(number, value)| (number.parse().unwrap(), value.parse().unwrap()))
        .collect();

    let mut wrong = Vec::new();
    for (number, Item { name, c, required, ours, .. }) in items.iter().enumerate() {
        match theirs.get(&number) {
            Some(value) if value == ours => {}
            Some(value) => wrong.push(format!("{name}: {ours:#x} in src/abi, {c} is {value:#x}")),
            None if *required => wrong.push(format!("{name}: the headers lack {c}; install a newer linux-libc-dev")),
            None => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_number_and_structure_is_compared() {
    let compared: BTreeSet<&str> = items().iter().map(|item| item.name).chain(NOT_IN_HEADERS).collect();
    let sources = [
        include_str!("../src/abi/vhost.rs"),
        include_str!("../src/abi/vduse.rs"),
        include_str!("../src/abi/virtio.rs"),
    ];
    let declared: Vec<&str> = sources.iter().flat_map(|source| source.lines()).filter_map(declared_name).collect();
    assert!(declared.len() > 250, "the scan of the sources found only {} names", declared.len());
    let forgotten: Vec<&&str> = declared.iter().filter(|name| !compared.contains(**name)).collect();
    assert!(forgotten.is_empty(), "add to the table: {forgotten:?}");
}

/// `src/abi` follows the headers of Linux 6.18; later ones may have more numbers.
#[test]
fn every_number_of_the_headers_is_in_src_abi() {
    let folder = tempfile::tempdir().unwrap();
    let macros = text(&cc(&includes(), folder.path(), &["-E", "-dM"]));
    let defined: BTreeMap<&str, &str> = macros
        .lines()
        .filter_map(|line| line.strip_prefix("#define "))
        .filter_map(|line| line.split_once(' '))
        .collect();
    let version: u32 = defined["LINUX_VERSION_CODE"].parse().unwrap();

    let ours: BTreeSet<String> = items().into_iter().map(|item| item.guard).collect();
    let missing: Vec<&&str> = defined
        .keys()
        .filter(|name| ["VHOST_", "VDUSE_", "VRING_", "VIRTIO_RING_F_"].iter().any(|prefix| name.starts_with(prefix)))
        .filter(|name| !ours.contains(**name))
        .collect();
    assert!(defined.contains_key("VHOST_SET_LOG_BASE"), "the list of macros lacks those of linux/vhost.h");
    assert!(missing.is_empty() || version > (6 << 16 | 18 << 8 | 255), "add to src/abi: {missing:?}");
}

#[test]
fn an_unknown_request_keeps_its_number() {
    for number in [0, 46, 99, 0x8000_0001, u32::MAX] {
        let request = FrontendRequest::read_from_bytes(&number.to_ne_bytes()).unwrap();
        assert_eq!(request.as_bytes(), number.to_ne_bytes());
        assert_eq!((request, request.name()), (FrontendRequest(number), None));
        assert_eq!(request.to_string(), format!("request {number}"));

        let request = BackendRequest::read_from_bytes(&number.to_ne_bytes()).unwrap();
        assert_eq!(request.as_bytes(), number.to_ne_bytes());
        assert_eq!(request.to_string(), format!("back-end request {number}"));

        let mut wire = [0; 12];
        wire[..4].copy_from_slice(&number.to_ne_bytes());
        let header = Header::read_from_bytes(&wire).unwrap();
        assert_eq!(header.request, number);
        assert_eq!(header.as_bytes(), wire);
    }
}

#[test]
fn a_known_request_is_displayed_with_the_specifications_name() {
    assert_eq!(FrontendRequest(11).to_string(), "GET_VRING_BASE");
    assert_eq!(FrontendRequest(21).to_string(), "SET_BACKEND_REQ_FD");
    assert_eq!(BackendRequest(2).to_string(), "BACKEND_CONFIG_CHANGE_MSG");
}

#[test]
fn requests_and_protocol_features_are_numbered_without_gaps() {
    assert!(FrontendRequest::KNOWN.iter().map(|request| request.0).eq(1..=45));
    assert!(BackendRequest::KNOWN.iter().map(|request| request.0).eq(1..=10));
    let features = ProtocolFeatures::FLAGS.iter().filter(|flag| flag.is_named());
    assert!(features.map(|flag| flag.value().bits()).eq((0..=23).map(|bit| 1 << bit)));
    // Single numbers of the specification, so that an insertion in the middle is noticed.
    assert_eq!(
        (FrontendRequest::GET_QUEUE_NUM.0, FrontendRequest::SET_CONFIG.0, FrontendRequest::GET_INFLIGHT_FD.0),
        (17, 25, 31)
    );
    assert_eq!(
        (FrontendRequest::GPU_SET_SOCKET.0, FrontendRequest::VRING_KICK.0, FrontendRequest::REM_MEM_REG.0),
        (33, 35, 38)
    );
    assert_eq!((ProtocolFeatures::CONFIG.bits(), ProtocolFeatures::INFLIGHT_SHMFD.bits()), (1 << 9, 1 << 12));
    assert_eq!(
        (ProtocolFeatures::CONFIGURE_MEM_SLOTS.bits(), ProtocolFeatures::DEVICE_STATE.bits()),
        (1 << 15, 1 << 19)
    );
}

#[test]
fn unknown_bits_are_kept() {
    let bits = 1 << 63 | 1 << 50 | 1 << 26;
    assert_eq!(!VirtioFeatures::from_bits_retain(!bits), VirtioFeatures::from_bits_retain(bits));
    assert_eq!(!ProtocolFeatures::from_bits_retain(!bits), ProtocolFeatures::from_bits_retain(bits));
    assert_eq!((!VHOST_VRING_F_LOG).bits(), !1);
}

/// The name of the constant or structure that a line of `src/abi` declares.
fn declared_name(line: &str) -> Option<&str> {
    if let Some(rest) = line.strip_prefix("pub const ") {
        return rest.split_once(':').map(|(name, _)| name).filter(|name| !name.starts_with("fn "));
    }
    let (name, size) = line.strip_prefix("    ")?.strip_suffix(" bytes {")?.split_once(", ")?;
    size.parse::<u32>().is_ok().then_some(name)
}

fn includes() -> String {
    HEADERS.iter().map(|header| format!("#include <{header}>\n")).collect()
}

fn cc(source: &str, folder: &Path, arguments: &[&str]) -> Output {
    let file = folder.join("abi.c");
    std::fs::write(&file, source).unwrap();
    let output = Command::new("cc")
        .args(["-std=gnu11", "-Wall", "-Werror"])
        .args(arguments)
        .arg(&file)
        .output()
        .unwrap_or_else(|error| panic!("cc: cannot be run ({error}): install gcc and linux-libc-dev"));
    assert!(
        output.status.success(),
        "cc: does not compile the program (are gcc and linux-libc-dev installed?):\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}
