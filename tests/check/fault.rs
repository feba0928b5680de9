//! Everything that the back-ends of these tests do wrong on purpose.

use vhost_migrate::abi::vhost_user::Request as Code;

use crate::backend_channel::ChannelFault;
use crate::iommu::IommuFault;
use crate::postcopy::PostcopyFault;
use crate::state::StateFault;

/// What a back-end does wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    None,
    /// A payload that is not there with its header ends the connection.
    NeedsWholeMessages,
    /// Blocks of 4096 bytes; requests for less break the ring.
    LargeBlocks,
    /// Need-reply stays in the flags of replies.
    CopiesNeedReplyFlag,
    /// Need-reply brings a second reply to what has one.
    SendsSecondReply,
    /// The protocol features are told after what was asked next.
    RepliesOutOfOrder,
    /// Unknown requests are left without an answer.
    IgnoresUnknownRequests,
    /// The fds of what is refused are kept.
    KeepsFds,
    /// A memory table must have the size of its regions.
    NeedsExactTableSize,
    /// A payload of 3 bytes ends the process.
    DiesOfShortPayload,
    /// A header of another version ends the process.
    DiesOfVersion,
    /// A request whose payload begins with these bytes ends the process.
    DiesOf(Code, &'static [u8]),
    /// An inflight region that begins with noise ends the process.
    DiesOfNoise,
    /// A descriptor that leads to itself ends the process.
    DiesOfLoop,
    /// SET_LOG_BASE is answered with 24 bytes.
    LongLogReply,
    /// Call fds that are sockets are not signalled.
    IgnoresSocketCallFds,
    /// Configuration space is always read from its start.
    IgnoresConfigOffset,
    /// Without protocol features no ring is enabled.
    NeedsEnable,
    /// Rings run although they are not enabled.
    RunsDisabledRings,
    /// GET_VRING_BASE is answered while requests are under way.
    RepliesBaseEarly,
    /// GET_VRING_BASE is answered with what is complete, and the ring goes on.
    RunsAfterGetBase,
    /// The base counts from 0 on every start.
    IgnoresBase,
    /// SET_VRING_ADDR has a running ring serve its last request again.
    RewindsOnSetAddr,
    /// No inflight region before the memory table.
    NeedsMemoryBeforeInflight,
    /// A log address is checked where it is not one.
    ChecksUnusedLogAddress,
    /// SET_STATUS 0 is noted, and that is all.
    IgnoresStatusReset,
    /// RESET_DEVICE is done as if it were not there.
    IgnoresResetDevice,
    /// RESET_OWNER ends the connection.
    HangsUpAtResetOwner,
    /// A new call fd has to wait for the next completion.
    ForgetsPendingCall,
    /// An unknown request ends the process.
    DiesOfUnknownRequest,
    /// Data is not logged.
    DoesNotLogData,
    /// A log begins where its file does.
    IgnoresLogOffset,
    /// A log ends where its file does.
    IgnoresLogSize,
    /// The used ring is logged where it is, whatever `log_guest_addr` says.
    IgnoresLogAddress,
    /// Whatever is logged, all of memory is.
    MarksEverything,
    /// Another log is not taken over.
    KeepsOldLog,
    /// Logging is never switched off.
    NeverStopsLogging,
    /// LOG_ALL is refused while there is no log.
    NeedsLogBeforeLogAll,
    /// Data is marked with the next message.
    MarksLate,
    /// Words of the log are written back as they were read a moment ago.
    WritesBackStaleMarks,
    /// Nothing is ever signalled after logging.
    DoesNotSignalLog,
    /// Who takes over a ring with a past logs nothing of what it does.
    SuccessorLogsNothing,
    /// Who takes over a ring with a past logs what it does, and no more.
    SuccessorMarksOnlyItsWrites,
    /// Nothing is logged after the memory table changed.
    StopsLoggingAtMemoryChange,
    /// There are 8 memory slots.
    OffersFewSlots,
    /// A log of no bytes is fine.
    AcceptsEmptyLog,
    /// The inflight region is said to have half its size.
    ReportsHalfRegion,
    /// The inflight region is not written.
    DoesNotWriteInflight,
    /// A successor takes up a ring behind what was open.
    SkipsOpenRequests,
    /// A fresh region begins at 0 wherever its ring is.
    StartsFreshRegionAtZero,
    /// Counters in the region stay 0.
    KeepsCountersZero,
    /// A reset leaves the region as it is.
    KeepsRegionAtReset,
    Iommu(IommuFault),
    BackendChannel(ChannelFault),
    /// Something in postcopy.
    Postcopy(PostcopyFault),
    /// Of a network interface, as a disk has no state.
    DeviceState(StateFault),
}
