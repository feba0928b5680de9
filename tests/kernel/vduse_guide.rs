//! The commands of docs/guide/vduse.md.

use std::env;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::libc;

use crate::modules::load;
use crate::process::program;
use crate::vduse::{Served, load_modules};

const GUIDE: &str = include_str!("../../docs/guide/vduse.md");
/// Number of CAP_NET_ADMIN, and of the last capability of any kernel.
const NET_ADMIN: libc::c_ulong = 12;
const LAST: libc::c_ulong = 63;

fn lines(fence: &str) -> impl Iterator<Item = &str> {
    let blocks = GUIDE.split(fence).skip(1).map(|rest| rest.split("```").next().unwrap());
    blocks.flat_map(str::lines)
}

/// Starts the command of a line of the guide.
fn served(line: &str, change: impl FnOnce(&mut Command)) -> Served {
    let words: Vec<_> = line.split_whitespace().skip(1).collect();
    let name = words.iter().skip_while(|word| **word != "--vduse").nth(1).unwrap();
    let mut command = program();
    command.args(&words);
    change(&mut command);
    Served::run(command, name)
}

#[test]
fn the_commands_of_the_guide_work() {
    load_modules();
    load("tun");
    env::set_current_dir("/tmp").unwrap();
    File::create("disk.img").unwrap().set_len(1 << 20).unwrap();
    let mut count = 0;
    for line in lines("```sh\n") {
        if line.starts_with("vhost-migrate backend ") {
            served(line, |_| ()).end();
            count += 1;
        } else if line.starts_with("vhost-migrate inspect ") {
            assert!(program().args(line.split_whitespace().skip(1)).status().unwrap().success(), "{line}");
        } else if line.starts_with("modprobe ") {
            assert!(Command::new("sh").args(["-c", line]).status().unwrap().success(), "{line}");
        }
    }
    assert_eq!(count, 4);
}

/// The unit runs as root, without any capability but CAP_NET_ADMIN.
#[test]
fn the_capabilities_of_the_unit_suffice() {
    fs::create_dir_all("/var/lib/disks").unwrap();
    File::create("/var/lib/disks/disk0.img").unwrap().set_len(1 << 20).unwrap();
    assert!(lines("```ini\n").any(|line| line == "CapabilityBoundingSet=CAP_NET_ADMIN"));
    let line = lines("```ini\n").find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let served = served(line, |command| {
        let drop_others = || {
            for capability in (0..=LAST).filter(|capability| *capability != NET_ADMIN) {
                // SAFETY: the call has no memory as argument.
                match Errno::result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }) {
                    Err(Errno::EINVAL) => break,
                    dropped => dropped?,
                };
            }
            Ok(())
        };
        // SAFETY: the closure makes system calls only.
        unsafe { command.pre_exec(drop_others) };
    });
    assert!(served.line.contains("(/dev/vd"), "{}", served.line);
    served.end();
    assert!(lines("```ini\n").any(|line| line == "DeviceAllow=char-vduse rw"));
    let drivers = fs::read_to_string("/proc/devices").unwrap();
    assert!(drivers.lines().any(|line| line.ends_with(" vduse")), "{drivers}");
}
