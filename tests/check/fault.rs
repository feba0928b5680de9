//! Everything that the back-ends of these tests do wrong on purpose.

use vhost_migrate::abi::vhost_user::Request as Code;

use crate::backend_channel::Channel;
use crate::iommu::Iommu;
use crate::postcopy::Late;
use crate::state::State;

/// What a back-end does wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Bend {
    Nothing,
    /// A payload that is not there with its header ends the connection.
    WholeMessages,
    /// Blocks of 4096 bytes; requests for less break the ring.
    LargeBlocks,
    /// Need-reply stays in the flags of replies.
    ReplyFlags,
    /// Need-reply brings a second reply to what has one.
    SecondReply,
    /// The protocol features are told after what was asked next.
    Overtaken,
    /// Unknown requests are left without an answer.
    NoRefusal,
    /// The fds of what is refused are kept.
    KeepsFds,
    /// A memory table must have the size of its regions.
    ExactTable,
    /// A payload of 3 bytes ends the process.
    DiesOfShort,
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
    NoSockets,
    /// Configuration space is always read from its start.
    ConfigOffset,
    /// Without protocol features no ring is enabled.
    NeedsEnable,
    /// Rings run although they are not enabled.
    Enabled,
    /// GET_VRING_BASE is answered while requests are under way.
    EarlyBase,
    /// GET_VRING_BASE is answered with what is complete, and the ring goes on.
    GoesOn,
    /// The base counts from 0 on every start.
    BaseForgotten,
    /// SET_VRING_ADDR has a running ring serve its last request again.
    AddrGoesBack,
    /// No inflight region before the memory table.
    MemoryFirst,
    /// A log address is checked where it is not one.
    LogAddressChecked,
    /// SET_STATUS 0 is noted, and that is all.
    StatusNoted,
    /// RESET_DEVICE is done as if it were not there.
    ResetIgnored,
    /// RESET_OWNER ends the connection.
    OwnerHangsUp,
    /// A new call fd has to wait for the next completion.
    CallForgotten,
    /// An unknown request ends the process.
    Dies,
    /// Data is not logged.
    NoData,
    /// A log begins where its file does.
    LogOffset,
    /// A log ends where its file does.
    LogSize,
    /// The used ring is logged where it is, whatever `log_guest_addr` says.
    LogAddress,
    /// Whatever is logged, all of memory is.
    Everything,
    /// Another log is not taken over.
    OldLog,
    /// Logging is never switched off.
    NeverOff,
    /// LOG_ALL is refused while there is no log.
    LogFirst,
    /// Data is marked with the next message.
    LateMarks,
    /// Words of the log are written back as they were read a moment ago.
    StaleMarks,
    /// Nothing is ever signalled after logging.
    NoSignal,
    /// Who takes over a ring with a past logs nothing of what it does.
    SuccessorForgets,
    /// Who takes over a ring with a past logs what it does, and no more.
    SuccessorMarksItsOwn,
    /// Nothing is logged after the memory table changed.
    MemoryForgetsLog,
    /// There are 8 memory slots.
    FewSlots,
    /// A log of no bytes is fine.
    EmptyLog,
    /// The inflight region is said to have half its size.
    HalfRegion,
    /// The inflight region is not written.
    NoInflight,
    /// A successor takes up a ring behind what was open.
    ForgetsOpen,
    /// A fresh region begins at 0 wherever its ring is.
    FreshAtZero,
    /// Counters in the region stay 0.
    NoCounters,
    /// A reset leaves the region as it is.
    RegionKept,
    Iommu(Iommu),
    Channel(Channel),
    /// Something in postcopy.
    Postcopy(Late),
    /// Of a network interface, as a disk has no state.
    State(State),
}
