//! Errors of the back-end. Messages name the violated rule.

#![forbid(unsafe_code)]

use std::io;

use crate::abi::features::{feature_names, protocol_feature_names};
use crate::abi::vhost_user::{FrontendRequest as Code, ProtocolFeatures};
use crate::abi::virtio::VirtioFeatures;
use crate::dirty::DirtyError;
use crate::inflight::InflightError;
use crate::memory::{Access, GuestAddress, Iova, MemoryError, UserAddress};
use crate::ring::RingError;

/// The reason for which a message was refused, a ring stopped, or a connection closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The flags of a header do not have protocol version 1.
    #[error("message {code} has flags {flags:#x}: the protocol version in bits 0-1 must be 1 (rule F2.3)")]
    Version {
        /// The request.
        code: Code,
        /// Its flags.
        flags: u32,
    },
    /// A message of the front-end has the reply flag.
    #[error("{code} has the reply flag, which only replies may have (rule F2.3)")]
    UnexpectedReply {
        /// The request.
        code: Code,
    },
    /// A header announces a payload larger than any message.
    #[error("{code} announces {size} bytes: no message is larger than {max} (rule F1.4)")]
    PayloadTooLarge {
        /// The request.
        code: Code,
        /// Bytes announced.
        size: u32,
        /// Most bytes accepted.
        max: u32,
    },
    /// The connection ended inside a message.
    #[error("the connection ended {got} bytes into a message of {needed} (rule F1.4)")]
    CutShort {
        /// Bytes that came.
        got: usize,
        /// Bytes that the message has.
        needed: usize,
    },
    /// The front-end stalled within a message, or does not read its replies.
    #[error("the front-end stalled within a message, or did not read its replies, for {seconds} s (rule R9.3)")]
    Stalled {
        /// Time limit, seconds.
        seconds: u64,
    },
    /// The payload is shorter than the content of the request.
    #[error("{code} has {got} bytes of payload, expected {needed} (rule F6.4)")]
    ShortPayload {
        /// The request.
        code: Code,
        /// Bytes that came.
        got: usize,
        /// Bytes needed.
        needed: usize,
    },
    /// A message has the wrong number of file descriptors.
    #[error("{code} has {got} file descriptors, expected {needed} (rule F1.5)")]
    FdCount {
        /// The request.
        code: Code,
        /// Number of descriptors received.
        got: usize,
        /// Number of descriptors required.
        needed: usize,
    },
    /// The request is unknown, or its feature was not acknowledged.
    #[error("{code} is not supported (rules F5.1, F5.2)")]
    Unsupported {
        /// The request.
        code: Code,
    },
    /// The front-end's socket can't be connected to, now or later.
    #[error("can't connect to {path} (a socket's path has at most 107 bytes)")]
    Connect {
        /// The socket.
        path: String,
        /// The error of the system.
        source: io::Error,
    },
    /// Another front-end runs its rings.
    #[error("ring {index} can't start: another front-end runs rings of this device; stop it first (rule R9.2)")]
    OtherFrontEndRuns {
        /// The ring.
        index: u16,
    },
    /// Virtio features were acknowledged that were not offered.
    #[error(
        "SET_FEATURES acknowledges features that were not offered: {} (rule R1.3)",
        feature_names(*unknown, None)
    )]
    UnofferedFeatures {
        /// The features that were not offered.
        unknown: VirtioFeatures,
    },
    /// Protocol features were acknowledged that were not offered.
    #[error(
        "SET_PROTOCOL_FEATURES acknowledges features that were not offered: {} (rule R1.3)",
        protocol_feature_names(*unknown)
    )]
    UnofferedProtocolFeatures {
        /// The features that were not offered.
        unknown: ProtocolFeatures,
    },
    /// A message names a ring that the device does not have.
    #[error("{code} names ring {index}, but the device has {queues} (rule R2.6)")]
    NoSuchRing {
        /// The request.
        code: Code,
        /// The index.
        index: u32,
        /// Rings of the device.
        queues: u16,
    },
    /// A ring size that is invalid, or larger than the device offers.
    #[error(
        "ring {index} can't have {size} entries: {} from 1 to {max} is needed (rule R2.6)",
        if *packed { "a number" } else { "a power of two" }
    )]
    RingSize {
        /// The ring.
        index: u16,
        /// Entries asked for.
        size: u32,
        /// Most entries.
        max: u16,
        /// It is a packed ring, which can have any number of entries.
        packed: bool,
    },
    /// A message that is only valid while the ring is stopped.
    #[error("{code} came while ring {index} runs: stop it with GET_VRING_BASE first (rule {rule})")]
    RingRunning {
        /// The request.
        code: Code,
        /// The ring.
        index: u16,
        /// The rule.
        rule: &'static str,
    },
    /// SET_FEATURES changes features that running rings use.
    #[error(
        "SET_FEATURES changes {} while rings run: only LOG_ALL may change then (rule R1.4)",
        feature_names(*changed, None)
    )]
    FeaturesOfRunningRings {
        /// The bits.
        changed: VirtioFeatures,
    },
    /// A started and enabled ring has no size, address or memory.
    #[error("ring {index} can't start: {missing} is missing (rule R6.4)")]
    RingIncomplete {
        /// The ring.
        index: u16,
        /// The message that is missing.
        missing: &'static str,
    },
    /// An area of a ring is outside guest memory.
    #[error(
        "the {part} of ring {index} is not in guest memory: send SET_VRING_ADDR with addresses of the memory table \
         (rule R6.4)"
    )]
    RingAddress {
        /// The ring.
        index: u16,
        /// Descriptor table, available ring or used ring.
        part: &'static str,
        /// Why.
        source: MemoryError,
    },
    /// A used ring cannot be logged at this address.
    #[error("ring {index} asks to be logged at {:#x}, which is not aligned to 4 or wraps around (rule L3.4)", gpa.0)]
    LogAddress {
        /// The ring.
        index: u16,
        /// `log_guest_addr`.
        gpa: GuestAddress,
    },
    /// The memory table is invalid.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// REM_MEM_REG names an unknown region.
    #[error("no region at {:#x} with size {size:#x} and user address {user_addr:#x} to remove (rule M1.2)", gpa.0)]
    NoSuchRegion {
        /// Guest-physical address.
        gpa: GuestAddress,
        /// Bytes.
        size: u64,
        /// Front-end address.
        user_addr: UserAddress,
    },
    /// There are more regions than memory slots.
    #[error("all {slots} memory slots are in use (rule M1.3)")]
    NoSlot {
        /// Slots.
        slots: usize,
    },
    /// The dirty log is invalid.
    #[error(transparent)]
    Log(#[from] DirtyError),
    /// The inflight region is invalid.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// The inflight region does not match the queues of the device.
    #[error(
        "an inflight region for {queues} queues of {size} entries doesn't fit a device of {max} queues (rule I1.2)"
    )]
    InflightQueues {
        /// Queues asked for.
        queues: u16,
        /// Entries asked for.
        size: u16,
        /// Queues of the device.
        max: u16,
    },
    /// The driver or the front-end broke a ring.
    #[error("ring {index} is broken and stops until it is set up again")]
    BrokenRing {
        /// The ring.
        index: u16,
        /// The fault.
        source: RingError,
    },
    /// The front-end refuses a translation for a ring behind an IOMMU, or permits less than the required access.
    #[error(
        "ring {index} is broken and stops until it is set up again: the front-end refuses {access:?} at {iova:#x} behind \
         the IOMMU: map it before it is made available (rule T1.4)"
    )]
    AccessRefused {
        /// The ring.
        index: u16,
        /// I/O virtual address.
        iova: Iova,
        /// The required access.
        access: Access,
    },
    /// The areas of a ring behind an IOMMU cannot be mapped.
    #[error("ring {index} is broken and stops until it is set up again")]
    RingTranslation {
        /// The ring.
        index: u16,
        /// The fault.
        source: MemoryError,
    },
    /// An IOTLB message of a kind that is not for back-ends.
    #[error("IOTLB_MSG of kind {kind}: a front-end sends updates (2) and invalidations (3) (rule T2.1)")]
    IotlbKind {
        /// The kind.
        kind: u8,
    },
    /// The driver made a descriptor available that is already in flight.
    #[error("ring {index} is broken and stops until it is set up again: descriptor {head} was made available twice")]
    HeadInFlight {
        /// The ring.
        index: u16,
        /// Head of the chain.
        head: u16,
    },
    /// The thread of a ring panicked, so the base of the ring is unknown.
    #[error(
        "ring {index}: its thread has failed, which is a bug; the connection ends, connect again to go on (rule R9.1)"
    )]
    WorkerLost {
        /// The ring.
        index: u16,
    },
    /// Configuration space cannot be read or written like this.
    #[error("{code}: {len} bytes at {offset} of configuration space: {why} (rule C1.3)")]
    Config {
        /// GET_CONFIG or SET_CONFIG.
        code: Code,
        /// Offset.
        offset: u32,
        /// Bytes.
        len: u32,
        /// The fault.
        why: &'static str,
    },
    /// The device does not support this MTU.
    #[error("NET_SET_MTU requests {mtu} bytes; this device supports 68 to {most}")]
    Mtu {
        /// Bytes asked for.
        mtu: u64,
        /// Most bytes.
        most: u16,
    },
    /// A postcopy message is out of order.
    #[error("{why} (rule P1)")]
    Postcopy {
        /// The message and the state in which it arrived.
        why: &'static str,
    },
    /// The device state cannot be saved or loaded.
    #[error("the device state is refused: {why} (rule D1.4)")]
    DeviceState {
        /// The fault, with advice.
        why: String,
    },
    /// The generation of the disk is not available.
    #[error("the disk's generation is not available: {why} (GET_DISK_GENERATION)")]
    DiskGeneration {
        /// The reason, as the image or the system gives it.
        why: String,
    },
    /// The identity of the disk is not available.
    #[error("the disk's identity is not available: {why} (GET_DISK_IDENTITY)")]
    DiskIdentity {
        /// The reason, as the image or the system gives it.
        why: String,
    },
    /// The kick of a ring is no eventfd.
    #[error("ring {index}: its kick is no eventfd: send SET_VRING_KICK with one (rule F9.3)")]
    KickFd {
        /// The ring.
        index: u16,
    },
    /// INBAND_NOTIFICATIONS was acknowledged without the features that it requires.
    #[error("SET_PROTOCOL_FEATURES acknowledges INBAND_NOTIFICATIONS without BACKEND_REQ and REPLY_ACK (rule B3.1)")]
    InbandNotifications,
    /// A request cannot be sent over the back-end channel.
    #[error("the back-end channel: {why} (rule B1.1)")]
    BackendChannel {
        /// The obstacle.
        why: &'static str,
    },
    /// A system call failed.
    #[error("can't {what}")]
    System {
        /// The operation that failed.
        what: &'static str,
        /// The error of the system.
        source: io::Error,
    },
    /// The socket cannot be listened on. The message has advice.
    #[error("can't listen on {path}: {advice}")]
    Listen {
        /// The socket.
        path: String,
        /// Advice for the user.
        advice: String,
        /// The error of the system, if there was one.
        #[source]
        source: Option<io::Error>,
    },
}

impl BackendError {
    pub(super) fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> BackendError {
        move |source| BackendError::System { what, source: source.into() }
    }
}
