//! Files of saves when the guest's process ends or the save fails.

use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;

use super::{ChildProcess, Host, migrate, program, slow_migration, text, verify, wait_for_state};

/// Makes openat fail with O_TMPFILE in a child process, as on a file system without unnamed files.
fn disable_unnamed_files(command: &mut Command) {
    use seccompiler::SeccompCmpArgLen::Dword;
    use seccompiler::SeccompCmpOp::MaskedEq;
    use seccompiler::{BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, TargetArch};
    let tmpfile = libc::O_TMPFILE as u64;
    let unnamed = SeccompCondition::new(2, Dword, MaskedEq(tmpfile), tmpfile).unwrap();
    let rules = [(libc::SYS_openat, vec![SeccompRule::new(vec![unnamed]).unwrap()])].into();
    let refused = SeccompAction::Errno(libc::EOPNOTSUPP as u32);
    let arch = TargetArch::try_from(std::env::consts::ARCH).unwrap();
    let filter: BpfProgram =
        SeccompFilter::new(rules, SeccompAction::Allow, refused, arch).unwrap().try_into().unwrap();
    // SAFETY: only system calls are made between fork and exec.
    unsafe {
        command.pre_exec(move || seccompiler::apply_filter(&filter).map_err(|_| io::ErrorKind::Other.into()));
    }
}

#[rstest]
fn a_guest_process_ended_during_a_save_leaves_no_partial_file(
    #[values(Signal::SIGTERM, Signal::SIGINT)] signal: Signal,
) {
    let mut host = Host::new();
    let backend = host.backend("source.vhost");
    let source = host.path("source.control");
    let mut command = program();
    command.args(["guest", "--memory", "64MiB", "--backend"]).arg(backend).arg("--control").arg(&source);
    disable_unnamed_files(&mut command);
    let mut guest = ChildProcess(command.stdout(Stdio::null()).spawn().unwrap());
    wait_for_state(&source, "running");
    let folder = host.path("saves");
    std::fs::create_dir(&folder).unwrap();
    let (_slow, _events) = slow_migration(&source, &format!("file:{}", folder.join("guest.vhm").display()));
    let names = || std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
    assert!(names().len() == 1 && names()[0].to_str().unwrap().ends_with(".partial"), "{:?}", names());
    kill(Pid::from_raw(guest.0.id() as i32), signal).unwrap();
    let ended = guest.0.wait().unwrap();
    // With an exit code if the signal was ignored at the start of this test.
    assert!(ended.signal() == Some(signal as i32) || ended.code() == Some(128 + signal as i32), "{ended:?}");
    assert_eq!(names(), Vec::<std::ffi::OsString>::new());
}

#[test]
fn a_save_is_refused_onto_own_descriptors_and_onto_a_disk_image() {
    let (host, source) = Host::with_source();
    let guest = host.running.last().unwrap().0.id();
    let mut own = 0;
    for entry in std::fs::read_dir(format!("/proc/{guest}/fd")).unwrap() {
        let number: u32 = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
        if number > 2 {
            let refused = migrate(&source, &format!("fd:{number}"), &["--one-way"]);
            // A connection to its control socket may have ended meanwhile.
            assert_eq!(refused.status.code(), Some(1), "{}", text(&refused.stderr));
            own += usize::from(text(&refused.stderr).contains("has opened this descriptor for itself"));
        }
    }
    assert!(own > 5, "{own} descriptors");
    let image = host.path("other.img");
    std::fs::write(&image, "a disk").unwrap();
    let refused = migrate(&source, &format!("file:{}", image.display()), &["--continue"]);
    assert!(text(&refused.stderr).contains("what is there is no saved guest"), "{}", text(&refused.stderr));
    assert_eq!(std::fs::read_to_string(&image).unwrap(), "a disk");
    verify(&source);
}

#[test]
fn a_file_size_limit_fails_a_save_and_the_guest_keeps_running() {
    let (host, source) = Host::with_source();
    let guest = host.running.last().unwrap().0.id().to_string();
    // 4 MB; the limit does not apply to the memory of a running guest.
    assert!(Command::new("prlimit").args(["--pid", &guest, "--fsize=4000000"]).status().unwrap().success());
    let output = migrate(&source, &format!("file:{}", host.path("guest.vhm").display()), &[]);
    let words = text(&output.stderr);
    assert!(output.status.code() == Some(1) && words.contains("File too large"), "{words}");
    verify(&source);
}
