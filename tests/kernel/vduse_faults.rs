//! VDUSE devices that cannot be served, and those whose process ends or stops.

use std::fs;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;

use crate::process::{program, text};
use crate::vduse::{Served, driver, left_behind, load_modules, refused};
use crate::vduse_blk::{image, serve};
use crate::wait::wait_until;

const MIB: u64 = 1 << 20;

#[test]
fn without_the_module_the_error_names_it() {
    load_modules();
    let image = image("module", MIB);
    let removed = Command::new("rmmod").arg("vduse").output().unwrap();
    assert!(removed.status.success(), "{}", text(&removed.stderr));
    let error = refused("blk", "module", &["--image", image.to_str().unwrap()]);
    load_modules();
    assert!(error.contains("run `modprobe vduse`"), "{error}");
}

#[test]
fn without_the_driver_the_error_names_it_and_nothing_is_left() {
    load_modules();
    let image = image("driver", MIB);
    let removed = Command::new("rmmod").arg("vhost_vdpa").output().unwrap();
    assert!(removed.status.success(), "{}", text(&removed.stderr));
    let error = refused("blk", "driver", &["--attach", "vhost", "--image", image.to_str().unwrap()]);
    load_modules();
    assert!(error.contains("run `modprobe vhost_vdpa`"), "{error}");
    assert!(left_behind("driver").is_empty());
}

#[test]
fn without_permission_the_error_says_so() {
    load_modules();
    let image = image("nobody", MIB);
    fs::set_permissions(&image, PermissionsExt::from_mode(0o666)).unwrap();
    let mut command = program();
    command.args(["backend", "blk", "--vduse", "nobody", "--image", image.to_str().unwrap()]);
    let output = command.uid(65534).gid(65534).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert!(error.contains("/dev/vduse/control is not permitted: run as root"), "{error}");
}

/// The permissions that a udev rule gives, as late as udev does.
#[test]
fn a_user_with_access_to_the_files_serves_a_disk_without_privileges() {
    load_modules();
    let image = image("user", MIB);
    let permit = |path: &str, mode| fs::set_permissions(path, PermissionsExt::from_mode(mode));
    permit(image.to_str().unwrap(), 0o666).unwrap();
    permit("/dev/vduse/control", 0o666).unwrap();
    fs::create_dir("/tmp/user").unwrap();
    permit("/tmp/user", 0o777).unwrap();
    let mut command = program();
    command.args(["backend", "blk", "--vduse", "user", "--state-dir", "/tmp/user", "--image", image.to_str().unwrap()]);
    let mut child = command.uid(65534).gid(65534).stdout(Stdio::piped()).spawn().unwrap();
    wait_until("the device may be opened", || permit("/dev/vduse/user", 0o666).is_ok());
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    let status = child.wait().unwrap();
    permit("/dev/vduse/control", 0o600).unwrap();
    assert!(line.contains("as VDUSE device user") && status.success(), "{line}");
    assert!(left_behind("user").is_empty());
}

#[rstest]
#[case("control")]
#[case("a/b")]
#[case("..")]
#[case("")]
fn a_name_that_no_file_can_have_is_refused(#[case] name: &str) {
    let error = refused("blk", name, &["--image", image("name", MIB).to_str().unwrap()]);
    assert!(error.contains("can't be the name of a VDUSE device"), "{error}");
}

#[test]
fn a_name_that_is_taken_is_refused_and_the_first_device_goes_on() {
    let (first, second) = (image("taken", 8 * MIB), image("second", 8 * MIB));
    let served = serve("taken", &first, &[]);
    for more in [&[][..], &["--replace"]] {
        let error = refused("blk", "taken", &[&["--image", second.to_str().unwrap()], more].concat());
        assert!(error.contains("taken: another process serves a VDUSE device of this name"), "{error}");
    }
    fs::read(served.disk()).unwrap();
    served.end();
}

/// Rules V3.1 to V3.3: what the killed process has completed is on the disk; what the page cache still has is lost, and the kernel
/// can remove the device.
#[rstest]
fn a_device_left_behind_is_reported_and_replaced(#[values(&[], &["--split-rings"])] more: &[&str]) {
    let (first, second) = (image("killed", 8 * MIB), image("killed2", 8 * MIB));
    let served = serve("killed", &first, more);
    let disk = served.disk();
    let file = OpenOptions::new().write(true).open(&disk).unwrap();
    file.write_all_at(&[1; 4096], 0).unwrap();
    file.sync_all().unwrap();
    // Written back only when the disk is removed.
    file.write_all_at(&[2; 4096], 8192).unwrap();
    served.kill();
    assert_eq!(left_behind("killed").len(), 2);

    let arguments = ["--attach", "virtio", "--image", second.to_str().unwrap()];
    let error = refused("blk", "killed", &arguments);
    assert!(error.contains("killed: a process that ended has left a VDUSE device of this name behind"), "{error}");
    assert!(error.contains("--replace"), "{error}");

    let served = serve("killed", &second, &["--replace"]);
    drop(file);
    assert_eq!(fs::read(served.disk()).unwrap(), vec![0; 8 << 20], "it is the other image");
    served.end();
    let bytes = fs::read(&first).unwrap();
    assert_eq!((bytes[0], bytes[8192]), (1, 0));
    assert_eq!(fs::read(&second).unwrap(), vec![0; 8 << 20], "the old disk's writes are not in the new image");
}

/// Rule V1.6.
#[test]
fn a_device_that_the_kernel_has_given_up_ends_with_an_error_and_is_removed() {
    let image = image("broken", 8 * MIB);
    let mut served = serve("broken", &image, &[]);
    fs::write(served.disk(), [5; 4096]).unwrap();
    fs::write("/sys/class/vduse/broken/msg_timeout", "1").unwrap();
    served.signal(Signal::SIGSTOP);
    // Waits for the answer to the reset.
    thread::spawn(|| driver("virtio_vdpa", "unbind", "broken")).join().unwrap();
    served.signal(Signal::SIGCONT);
    assert_eq!(served.wait().code(), Some(1));
    assert!(left_behind("broken").is_empty());
    assert_eq!(fs::read(&image).unwrap()[..4096], [5; 4096]);
}

/// Rules V1.6, V3.3: the log of such a device does not keep it from being replaced.
#[test]
fn a_device_that_the_kernel_has_given_up_without_its_process_is_replaced() {
    let image = image("given", 8 * MIB);
    let arguments = ["--attach", "virtio", "--image", image.to_str().unwrap()];
    let served = Served::start("blk", "given", &arguments);
    fs::write("/sys/class/vduse/given/msg_timeout", "1").unwrap();
    served.kill();
    driver("virtio_vdpa", "unbind", "given");
    let error = refused("blk", "given", &arguments);
    assert!(error.contains("the kernel has given up the device") && error.contains("--replace"), "{error}");
    Served::start("blk", "given", &[&arguments[..], &["--replace"]].concat()).end();
}
