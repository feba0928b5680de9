//! Faults that the back-ends of these tests inject.

use vhost_migrate::abi::vhost_user::FrontendRequest as Code;

use crate::backend_channel::ChannelFault;
use crate::iommu::IommuFault;
use crate::postcopy::PostcopyFault;
use crate::state::StateFault;

/// A fault of a back-end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    None,
    /// Closes the connection if a payload does not arrive with its header.
    NeedsWholeMessages,
    /// Blocks of 4096 bytes; smaller requests break the ring.
    LargeBlocks,
    /// Copies need-reply into the flags of replies.
    CopiesNeedReplyFlag,
    /// Sends a second reply to requests that have one of their own.
    SendsSecondReply,
    /// Replies to GET_PROTOCOL_FEATURES after the next request.
    RepliesOutOfOrder,
    /// Does not reply to unknown requests.
    IgnoresUnknownRequests,
    /// Does not close the fds of refused messages.
    KeepsFds,
    /// Accepts a memory table only without padding.
    NeedsExactTableSize,
    /// Exits at a payload of 3 bytes.
    DiesOfShortPayload,
    /// Exits at a header of another version.
    DiesOfVersion,
    /// Exits at a request whose payload begins with these bytes.
    DiesOf(Code, &'static [u8]),
    /// Exits at an inflight region that begins with noise.
    DiesOfNoise,
    /// Exits at a descriptor that links to itself.
    DiesOfLoop,
    /// Replies to SET_LOG_BASE with 24 bytes.
    LongLogReply,
    /// Does not signal call fds that are sockets.
    IgnoresSocketCallFds,
    /// Returns configuration space from its start, whatever the offset.
    IgnoresConfigOffset,
    /// Does not enable rings without protocol features.
    NeedsEnable,
    /// Serves rings that are not enabled.
    RunsDisabledRings,
    /// Replies to GET_VRING_BASE while requests are in flight.
    RepliesBaseEarly,
    /// Replies to GET_VRING_BASE with the completed requests, and continues the ring.
    RunsAfterGetBase,
    /// Starts every ring at base 0.
    IgnoresBase,
    /// Executes the last request again after SET_VRING_ADDR on a running ring.
    RewindsOnSetAddr,
    /// Refuses an inflight region before the memory table.
    NeedsMemoryBeforeInflight,
    /// Checks `log_guest_addr` without F_LOG.
    ChecksUnusedLogAddress,
    /// Ignores SET_STATUS 0.
    IgnoresStatusReset,
    /// Ignores RESET_DEVICE.
    IgnoresResetDevice,
    /// Closes the connection at RESET_OWNER.
    HangsUpAtResetOwner,
    /// Signals a new call fd only at the next completion.
    ForgetsPendingCall,
    /// Exits at an unknown request.
    DiesOfUnknownRequest,
    /// Does not log data.
    DoesNotLogData,
    /// Ignores the offset of a log.
    IgnoresLogOffset,
    /// Uses a log up to the end of its file.
    IgnoresLogSize,
    /// Logs the used ring at its own address instead of `log_guest_addr`.
    IgnoresLogAddress,
    /// Marks all of memory.
    MarksEverything,
    /// Keeps using the old log.
    KeepsOldLog,
    /// Never stops logging.
    NeverStopsLogging,
    /// Refuses LOG_ALL without a log.
    NeedsLogBeforeLogAll,
    /// Marks data at the next message.
    MarksLate,
    /// Writes back words of the log that were read a moment ago.
    WritesBackStaleMarks,
    /// Never signals the log fd.
    DoesNotSignalLog,
    /// Logs nothing on a continued ring.
    SuccessorLogsNothing,
    /// Logs only its own writes on a continued ring.
    SuccessorMarksOnlyItsWrites,
    /// Stops logging when the memory table changes.
    StopsLoggingAtMemoryChange,
    /// Offers 8 memory slots.
    OffersFewSlots,
    /// Accepts a log of no bytes.
    AcceptsEmptyLog,
    /// Reports half the size of the inflight region.
    ReportsHalfRegion,
    /// Does not write the inflight region.
    DoesNotWriteInflight,
    /// Continues a ring after the requests in flight.
    SkipsOpenRequests,
    /// Starts a fresh region at 0, whatever the ring's index.
    StartsFreshRegionAtZero,
    /// Leaves the counters in the region at 0.
    KeepsCountersZero,
    /// Does not change the region at a reset.
    KeepsRegionAtReset,
    Iommu(IommuFault),
    BackendChannel(ChannelFault),
    /// A fault in postcopy.
    Postcopy(PostcopyFault),
    /// A fault of the device state, of a network interface because disks have no such state.
    DeviceState(StateFault),
}
