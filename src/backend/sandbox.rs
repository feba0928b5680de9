//! seccomp filter of a serving process, for all its threads.
//!
//! Code that takes over the process, through a bug that a front-end or a guest exploits, keeps the open descriptors
//! (image, tap, guest memory) and gets nothing else: no program, file, socket, other process or executable memory.
//! `docs/security.md` explains each part. io_uring could bypass the filter, so its instances are created before and
//! restricted (`disk_io`), and no new ones are permitted.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::SeccompCmpOp::{self, Eq, MaskedEq};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
    apply_filter_all_threads,
};

use crate::abi::vduse;
use crate::memory::userfault;
use crate::sys::nonblocking;

/// The action for a forbidden system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ViolationAction {
    /// The process ends with SIGSYS.
    #[default]
    Kill,
    /// The call is executed and logged by the kernel, to find missing rules.
    Log,
}

/// A filter to install. The default permits what a device with open files needs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sandbox {
    /// The action for a forbidden system call.
    pub on_violation: ViolationAction,
    /// Permits removing files, for the listening socket at the end.
    pub allow_unlink: bool,
    /// Permits creating, binding and connecting SOCK_SEQPACKET sockets of the UNIX family, for `backend net --pair`.
    pub allow_pair: bool,
    /// Permits creating and connecting SOCK_STREAM sockets of the UNIX family, for a back-end that connects to its
    /// front-end.
    pub allow_connect: bool,
    /// Permits creating userfaultfds, for postcopy (rule P1).
    pub allow_userfaultfd: bool,
    /// Permits the ioctls of a VDUSE device that exists, and destroying it.
    pub allow_vduse: bool,
}

/// The reason for which the filter cannot be installed.
#[derive(Debug, thiserror::Error)]
#[error("system calls can't be filtered (read docs/security.md, and then use --seccomp off)")]
pub struct SandboxError(#[source] seccompiler::Error);

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// System calls permitted with any arguments. None takes a path or another process.
const ALLOWED: &[i64] = &[
    // Data: of what is open.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_io_uring_enter,
    // Signals of eventfds (rule F9.2): over the context that was made before.
    libc::SYS_io_submit,
    libc::SYS_io_getevents,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_fadvise64,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    // The generation of an image (GET_DISK_GENERATION): of what is open.
    libc::SYS_fgetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_close,
    // Connections: only over sockets that listen already.
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    // Waiting.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_restart_syscall,
    // Memory; what can be executed is below.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_memfd_create,
    // Threads and signals of this process.
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getrandom,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigreturn,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// System calls refused with EACCES, which libraries try and can do without, for example when a panic prints its
/// location.
const REFUSED: &[i64] = &[
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    libc::SYS_faccessat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
];
/// System calls that query a file by descriptor or path, and the argument that has the flags.
const STAT: [(i64, u8); 2] = [(libc::SYS_newfstatat, 3), (libc::SYS_statx, 2)];

/// Socket options that may be read: type, error, listening.
const GETSOCKOPT: [i32; 3] = [libc::SO_TYPE, libc::SO_ERROR, libc::SO_ACCEPTCONN];
/// Socket options that may be set: timeouts. Others attach programs (SO_ATTACH_FILTER, SO_ATTACH_BPF) or configure
/// protocols.
const SETSOCKOPT: [i32; 2] = [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO];

/// fcntl commands: flags, seals, and duplicates of open descriptors.
const FCNTL: &[i32] = &[
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_DUPFD_CLOEXEC,
    libc::F_ADD_SEALS,
    libc::F_GET_SEALS,
];

/// Ioctls of a VDUSE device that is served.
const VDUSE: [u32; 8] = [
    vduse::VDUSE_DESTROY_DEV,
    vduse::VDUSE_DEV_GET_FEATURES,
    vduse::VDUSE_DEV_INJECT_CONFIG_IRQ,
    vduse::VDUSE_DEV_SET_CONFIG,
    vduse::VDUSE_IOTLB_GET_FD,
    vduse::VDUSE_VQ_GET_INFO,
    vduse::VDUSE_VQ_INJECT_IRQ,
    vduse::VDUSE_VQ_SETUP_KICKFD,
];

/// clone flags of a thread of this process.
const THREAD: i32 = libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND;
const NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP;

impl Sandbox {
    /// Installs the filter for all current and future threads of the process. It cannot be removed, and sets
    /// `PR_SET_NO_NEW_PRIVS`.
    ///
    /// # Errors
    /// [`SandboxError`] if the kernel does not support the filter or refuses it.
    pub fn install(self) -> Result<(), SandboxError> {
        nonblocking::prepare();
        // The filter that forbids further filters is installed last.
        let programs = || Ok::<_, seccompiler::Error>([no_clone3()?, self.refusals()?, self.allowed_calls()?]);
        let install =
            |programs: [BpfProgram; 3]| programs.iter().try_for_each(|program| apply_filter_all_threads(program));
        programs().and_then(install).map_err(SandboxError)
    }

    /// Compiles the permitted calls, and those that the other two filters answer.
    fn allowed_calls(self) -> Result<BpfProgram, seccompiler::Error> {
        let mut rules: Rules = ALLOWED.iter().chain(REFUSED).map(|call| (*call, vec![])).collect();
        let mut only = |call, alternatives: Vec<SeccompRule>| rules.insert(call, alternatives);
        let not_executable = || rule(&[(2, MaskedEq(libc::PROT_EXEC as u64), 0)]);
        only(libc::SYS_mmap, vec![not_executable()?]);
        only(libc::SYS_mprotect, vec![not_executable()?]);
        only(libc::SYS_clone, vec![rule(&[(0, MaskedEq((THREAD | NAMESPACES) as u64), THREAD as u64)])?]);
        only(libc::SYS_clone3, vec![]);
        let own = u64::from(std::process::id());
        only(libc::SYS_tgkill, vec![rule(&[(0, Eq, own)])?]);
        only(libc::SYS_kcmp, vec![rule(&[(0, Eq, own), (1, Eq, own)])?]);
        for (call, _) in STAT {
            only(call, vec![]);
        }
        let option = |name: &i32| rule(&[(1, Eq, libc::SOL_SOCKET as u64), (2, Eq, *name as u64)]);
        only(libc::SYS_getsockopt, GETSOCKOPT.iter().map(option).collect::<Result<_, _>>()?);
        only(libc::SYS_setsockopt, SETSOCKOPT.iter().map(option).collect::<Result<_, _>>()?);
        let of_userfaultfd = userfault::IOCTLS.into_iter().filter(|_| self.allow_userfaultfd);
        let of_vduse = VDUSE.into_iter().filter(|_| self.allow_vduse);
        // Their numbers are of 32 bits, in types that differ from libc to libc.
        let ioctls = [libc::FIONBIO].into_iter().chain(of_userfaultfd).map(|number| number as u32).chain(of_vduse);
        only(libc::SYS_ioctl, ioctls.map(|number| rule(&[(1, Eq, u64::from(number))])).collect::<Result<_, _>>()?);
        only(
            libc::SYS_prctl,
            vec![rule(&[(0, Eq, libc::PR_SET_NAME as u64)])?, rule(&[(0, Eq, libc::PR_SET_VMA as u64)])?],
        );
        let commands = FCNTL.iter().map(|command| rule(&[(1, Eq, *command as u64)]));
        only(libc::SYS_fcntl, commands.collect::<Result<_, _>>()?);
        for (call, rules) in read_only_open()? {
            only(call, rules);
        }
        if self.allow_unlink || self.allow_pair {
            let (call, rules) = unlink_rule()?;
            only(call, rules);
        }
        if self.allow_userfaultfd {
            only(libc::SYS_userfaultfd, vec![]);
        }
        let kinds = [(self.allow_pair, libc::SOCK_SEQPACKET), (self.allow_connect, libc::SOCK_STREAM)];
        let kinds = kinds.into_iter().filter(|(allowed, _)| *allowed);
        let kind = |(_, kind)| rule(&[(0, Eq, libc::AF_UNIX as u64), (1, MaskedEq(0xf), kind as u64)]);
        let sockets = kinds.map(kind).collect::<Result<Vec<_>, _>>()?;
        if !sockets.is_empty() {
            only(libc::SYS_socket, sockets);
            only(libc::SYS_connect, vec![]);
        }
        if self.allow_pair {
            for call in [libc::SYS_bind, libc::SYS_listen] {
                only(call, vec![]);
            }
        }
        let violation = match self.on_violation {
            ViolationAction::Kill => SeccompAction::KillProcess,
            ViolationAction::Log => SeccompAction::Log,
        };
        compile(rules, violation, SeccompAction::Allow)
    }

    /// Compiles the calls that are refused without ending the process.
    fn refusals(self) -> Result<BpfProgram, seccompiler::Error> {
        let mut rules: Rules = REFUSED.iter().map(|call| (*call, vec![])).collect();
        rules.extend(read_only_open()?);
        // Before a socket file is removed it is checked, without following links, to be the own one.
        let allowed =
            if self.allow_unlink { libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW } else { libc::AT_EMPTY_PATH };
        for (call, flags) in STAT {
            rules.insert(call, vec![rule(&[(flags, MaskedEq(allowed as u64), 0)])?]);
        }
        compile(rules, SeccompAction::Allow, SeccompAction::Errno(libc::EACCES as u32))
    }
}

/// Compiles a filter that answers clone3 with ENOSYS. Its flags are in memory, which a filter cannot read; libc then
/// uses clone.
fn no_clone3() -> Result<BpfProgram, seccompiler::Error> {
    let rules = Rules::from([(libc::SYS_clone3, vec![])]);
    compile(rules, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))
}

/// Rules for attempts to open a file for reading.
fn read_only_open() -> Result<Rules, seccompiler::Error> {
    let changes = (libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC) as u64;
    let reads = |flags| Ok::<_, seccompiler::Error>(vec![rule(&[(flags, MaskedEq(changes), 0)])?]);
    Ok(Rules::from([
        #[cfg(target_arch = "x86_64")]
        (libc::SYS_open, reads(1)?),
        (libc::SYS_openat, reads(2)?),
    ]))
}

/// The rule for removing a file, but not a directory.
fn unlink_rule() -> Result<(i64, Vec<SeccompRule>), seccompiler::Error> {
    #[cfg(target_arch = "x86_64")]
    let call = (libc::SYS_unlink, vec![]);
    #[cfg(not(target_arch = "x86_64"))]
    let call = (libc::SYS_unlinkat, vec![rule(&[(2, Eq, 0)])?]);
    Ok(call)
}

/// Returns a rule with all conditions: argument number, comparison and value.
fn rule(conditions: &[(u8, SeccompCmpOp, u64)]) -> Result<SeccompRule, seccompiler::Error> {
    let conditions = conditions
        .iter()
        .map(|(argument, how, value)| SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, how.clone(), *value));
    Ok(SeccompRule::new(conditions.collect::<Result<_, _>>()?)?)
}

fn compile(rules: Rules, other: SeccompAction, matching: SeccompAction) -> Result<BpfProgram, seccompiler::Error> {
    let arch: TargetArch = std::env::consts::ARCH.try_into()?;
    Ok(SeccompFilter::new(rules, other, matching, arch)?.try_into()?)
}
