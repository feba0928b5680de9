//! Transports: every URI carries a migration, unrelated and hanging peers do not block one, cancellation ends every
//! wait, and errors include advice.
#![allow(clippy::unwrap_used, clippy::panic, clippy::single_range_in_vec_init)]

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vhost_migrate::memory::{GuestAddress, LOG_PAGE, Memory, Region, UserAddress, sealed_memfd};
use vhost_migrate::stream::{
    CancelToken, Codec, FrameKind, MigrationId, RateLimiter, StreamChannel, StreamConnection, StreamError,
    StreamListener, StreamOptions, ToSource, Uri, connect,
};
use vhost_migrate::unstable::stream::frame::{
    ConnectionHeader, FrameReader, HEADER_BYTES, MAGIC, OLDEST_VERSION, VERSION,
};
use vhost_migrate::unstable::stream::pages::{IncomingMemory, PageDecoder, PageEncoder, runs_of_channel};
use vhost_migrate::unstable::stream::record::{RoundEnd, ToDestination};

fn options(channels: u16) -> StreamOptions {
    StreamOptions::new().unwrap().with_channels(channels)
}

fn uri(text: impl AsRef<str>) -> Uri {
    text.as_ref().parse().unwrap()
}

fn unix(folder: &Path) -> Uri {
    uri(format!("unix:{}/socket", folder.display()))
}

/// A listener at a Unix socket in a folder, its URI and its path.
fn listening() -> (tempfile::TempDir, StreamListener, Uri, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let to = unix(folder.path());
    let listener = StreamListener::bind(&to).unwrap();
    let path = folder.path().join("socket");
    (folder, listener, to, path)
}

fn memory(pages: u64) -> Memory {
    let fd = sealed_memfd("guest", pages * LOG_PAGE).unwrap();
    let region = Region::map(fd.as_fd(), GuestAddress(0), pages * LOG_PAGE, UserAddress(0), 0).unwrap();
    Memory::new([Arc::new(region)]).unwrap()
}

/// Returns memory with a different text in each page; every third page is zero.
fn filled(pages: u64) -> Memory {
    let memory = memory(pages);
    for page in (0..pages).filter(|page| page % 3 != 0) {
        let text = format!("this is page {page:5} ").repeat(220);
        memory.write(GuestAddress(page * LOG_PAGE), &text.as_bytes()[..LOG_PAGE as usize]).unwrap();
    }
    memory
}

fn memory_equals(one: &Memory, other: &Memory) -> bool {
    let bytes = |memory: &Memory| {
        let mut bytes = vec![0; memory.size() as usize];
        memory.read(GuestAddress(0), &mut bytes).unwrap();
        bytes
    };
    bytes(one) == bytes(other)
}

fn source(connection: &StreamConnection, memory: &Memory, codec: Codec) {
    let pages = memory.size() / LOG_PAGE;
    let channels = connection.channels.len() as u16;
    thread::scope(|scope| {
        for (mut writer, number) in connection.writers().into_iter().zip(0..) {
            scope.spawn(move || {
                let runs = runs_of_channel([(0..pages).into()], number, channels);
                let sent = PageEncoder::new(codec).unwrap().send(memory, runs, &mut writer).unwrap();
                let end = RoundEnd::new(0, true, &sent);
                ToDestination::RoundEnd(end).write(&mut writer).unwrap();
            });
        }
    });
    if !connection.one_way {
        let mut answers = connection.readers().remove(0);
        assert_eq!(ToSource::next(&mut answers).unwrap(), ToSource::Ready);
    }
}

fn receive(
    mut reader: FrameReader<StreamChannel>,
    target: &Arc<IncomingMemory>,
    number: u16,
    channels: u16,
) -> Result<(), StreamError> {
    let mut decoder = PageDecoder::new(target.clone(), number, channels)?;
    let mut received = vhost_migrate::stream::PageStats::default();
    loop {
        let header = reader.next_frame()?;
        if header.kind == FrameKind::Pages {
            received += decoder.receive(&header, &mut reader)?;
        } else if let ToDestination::RoundEnd(end) = ToDestination::read(&header, &mut reader)? {
            return end.check_received(&received);
        }
    }
}

fn destination(connection: &StreamConnection, target: &Arc<IncomingMemory>) -> Result<(), StreamError> {
    let channels = connection.channels.len() as u16;
    thread::scope(|scope| {
        let receivers = connection
            .readers()
            .into_iter()
            .zip(0..)
            .map(|(reader, number)| scope.spawn(move || receive(reader, target, number, channels)));
        let receivers: Vec<_> = receivers.collect();
        receivers.into_iter().try_for_each(|receiver| receiver.join().unwrap())
    })?;
    if !connection.one_way {
        ToSource::Ready.write(&mut connection.writers().remove(0))?;
    }
    Ok(())
}

/// Sends memory from a separate thread to this one.
fn migrate(listener: &StreamListener, to: &Uri, options: StreamOptions, codec: Codec) {
    let from = filled(700);
    let target = Arc::new(IncomingMemory::zeroed(memory(700)));
    thread::scope(|scope| {
        scope.spawn(|| {
            let connection = connect(to, &options).unwrap();
            source(&connection, &from, codec);
            connection.finish().unwrap();
        });
        let connection = listener.accept(&StreamOptions::new().unwrap()).unwrap();
        assert_eq!(connection.channels.len(), usize::from(options.channels));
        assert_eq!(connection.one_way, options.one_way);
        destination(&connection, &target).unwrap();
    });
    assert!(memory_equals(&from, target.memory()));
}

#[test]
fn memory_arrives_over_unix_sockets_and_the_socket_file_is_removed() {
    let (folder, listener, to, _) = listening();
    migrate(&listener, &to, options(1), Codec::None);
    migrate(&listener, &to, options(3), Codec::Zstd(1));
    migrate(&listener, &to, options(2).with_one_way(true), Codec::None);
    drop(listener);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn memory_arrives_over_tcp_on_a_system_chosen_port() {
    let listener = StreamListener::bind(&uri("tcp:127.0.0.1:0")).unwrap();
    migrate(&listener, listener.uri(), options(1), Codec::Zstd(3));
    migrate(&listener, listener.uri(), options(4), Codec::None);
    if let Ok(listener) = StreamListener::bind(&uri("tcp:[::1]:0")) {
        migrate(&listener, listener.uri(), options(2), Codec::None);
    }
}

#[test]
fn memory_is_saved_to_and_restored_from_a_file_readable_only_by_its_owner() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("saved");
    let to = uri(format!("file:{}", path.display()));
    let from = filled(700);
    let connection = connect(&to, &options(1)).unwrap();
    assert!(connection.one_way);
    source(&connection, &from, Codec::None);
    assert!(!path.exists(), "half a file under the name of a whole one");
    connection.finish().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let restored = StreamListener::bind(&to).unwrap().accept(&options(1)).unwrap();
    let target = Arc::new(IncomingMemory::zeroed(memory(700)));
    destination(&restored, &target).unwrap();
    assert!(memory_equals(&from, target.memory()));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn an_abandoned_save_leaves_the_existing_file_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("saved");
    fs::write(&path, MAGIC).unwrap();
    let connection = connect(&uri(format!("file:{}", path.display())), &options(1)).unwrap();
    source(&connection, &filled(10), Codec::None);
    drop(connection);
    assert_eq!(fs::read(&path).unwrap(), MAGIC);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_full_disk_is_reported_as_disk_full() {
    let connection = connect(&uri("file:/dev/full"), &options(1));
    assert!(matches!(connection, Err(StreamError::DiskFull)), "{connection:?}");
}

#[test]
fn memory_arrives_through_filter_commands() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("saved.gz");
    let from = filled(700);
    let to = uri(format!("exec:gzip -1 > '{}'", path.display()));
    let connection = connect(&to, &options(1).with_one_way(true)).unwrap();
    source(&connection, &from, Codec::None);
    connection.finish().unwrap();
    assert!(fs::metadata(&path).unwrap().len() < 700 * 4096 / 4);
    let back = StreamListener::bind(&uri(format!("exec:gzip -dc '{}'", path.display()))).unwrap();
    let restored = back.accept(&options(1)).unwrap();
    let target = Arc::new(IncomingMemory::zeroed(memory(700)));
    destination(&restored, &target).unwrap();
    restored.finish().unwrap();
    assert!(memory_equals(&from, target.memory()));
}

#[test]
fn a_bidirectional_command_works_and_its_failure_is_reported() {
    // `cat` returns the header like a destination.
    let connection = connect(&uri("exec:cat"), &options(1)).unwrap();
    assert!(!connection.one_way);
    connection.finish().unwrap();
    let one_way = options(1).with_one_way(true);
    let connection = connect(&uri("exec:cat >/dev/null; exit 3"), &one_way).unwrap();
    let error = connection.finish().unwrap_err();
    assert!(matches!(error, StreamError::Command { .. }) && error.to_string().contains("exit status: 3"), "{error}");
}

#[test]
fn an_abandoned_migration_kills_its_command() {
    let folder = tempfile::tempdir().unwrap();
    let pid = folder.path().join("pid");
    let command = uri(format!("exec:echo $$ > '{0}.new'; mv '{0}.new' '{0}'; sleep 1000", pid.display()));
    let connection = connect(&command, &options(1).with_one_way(true)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !pid.exists() {
        assert!(Instant::now() < deadline, "the command has not started");
        thread::yield_now();
    }
    let pid: i32 = fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
    drop(connection);
    assert_eq!(nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None), Err(nix::Error::ESRCH));
}

#[test]
fn memory_arrives_over_inherited_sockets_pipes_and_files() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let listener = StreamListener::bind(&Uri::Fd(theirs.as_raw_fd())).unwrap();
    migrate(&listener, &Uri::Fd(ours.as_raw_fd()), options(1), Codec::None);
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let listener = StreamListener::bind(&Uri::Fd(reader.as_raw_fd())).unwrap();
    let one_way = options(1).with_one_way(true);
    migrate(&listener, &Uri::Fd(writer.as_raw_fd()), one_way, Codec::Zstd(1));
}

#[test]
fn a_closed_fd_and_too_many_channels_are_reported() {
    let error = connect(&uri("fd:777"), &options(1)).unwrap_err().to_string();
    assert!(error.contains("file descriptor 777 is not open"), "{error}");
    for single in ["fd:1", "exec:cat", "file:/nowhere/at/all"] {
        let error = connect(&uri(single), &options(2)).unwrap_err().to_string();
        assert!(error.contains("use --channels 1"), "{error}");
    }
    for channels in [0, 65] {
        let error = connect(&uri("unix:/nowhere/at/all"), &options(channels)).unwrap_err().to_string();
        assert!(error.contains("use 1 to 64"), "{error}");
    }
}

#[test]
fn unrelated_connections_are_dropped_and_the_migration_goes_on() {
    let (_folder, listener, to, path) = listening();
    // A silent peer, an HTTP client, half a migration, a repeated channel, and a disconnected peer.
    let _silent = UnixStream::connect(&path).unwrap();
    let mut http = UnixStream::connect(&path).unwrap();
    http.write_all(b"GET / HTTP/1.1\r\nHost: somebody.example\r\n\r\n").unwrap();
    let header = ConnectionHeader { channels: 2, ..ConnectionHeader::new(MigrationId(7)) };
    let mut half = [UnixStream::connect(&path).unwrap(), UnixStream::connect(&path).unwrap()];
    half.iter_mut().for_each(|stream| stream.write_all(&header.encode()).unwrap());
    let mut gone = UnixStream::connect(&path).unwrap();
    let one = ConnectionHeader { channels: 1, one_way: true, ..header };
    gone.write_all(&one.encode()[..20]).unwrap();
    drop(gone);
    migrate(&listener, &to, options(3), Codec::None);
    assert_eq!(http.read(&mut [0; 1]).unwrap_or(0), 0, "the peer was answered");
}

#[test]
fn a_disconnected_source_does_not_block_the_next_migration() {
    let (_folder, listener, to, path) = listening();
    let header = ConnectionHeader { channels: 2, ..ConnectionHeader::new(MigrationId(7)) };
    let mut dead = UnixStream::connect(&path).unwrap();
    dead.write_all(&header.encode()).unwrap();
    drop(dead);
    let mut other = UnixStream::connect(&path).unwrap();
    other.write_all(&ConnectionHeader { channel: 1, ..header }.encode()).unwrap();
    migrate(&listener, &to, options(1), Codec::None);
}

#[test]
fn both_sides_report_which_version_is_older() {
    let (folder, listener, to, path) = listening();
    // A source that is too old finds the oldest version in the reply.
    let mut older = UnixStream::connect(&path).unwrap();
    let header = ConnectionHeader::new(MigrationId(7));
    older.write_all(&ConnectionHeader { version: OLDEST_VERSION - 1, ..header }.encode()).unwrap();
    migrate(&listener, &to, options(1), Codec::None);
    assert_eq!(ConnectionHeader::read(&mut older).unwrap().version, OLDEST_VERSION);
    // This source connects to a destination that no longer knows its version.
    let newer = UnixListener::bind(folder.path().join("newer")).unwrap();
    let source = thread::spawn(move || connect(&uri(format!("unix:{}/newer", folder.path().display())), &options(1)));
    let mut newer = newer.accept().unwrap().0;
    newer.read_exact(&mut [0; HEADER_BYTES]).unwrap();
    newer.write_all(&ConnectionHeader { version: VERSION + 1, ..header }.encode()).unwrap();
    let error = source.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("the peer is newer, update this program"), "{error}");
}

#[test]
fn a_stale_socket_file_is_replaced_and_a_live_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let to = unix(folder.path());
    let Uri::Unix(path) = &to else { panic!() };
    drop(UnixListener::bind(path).unwrap());
    assert!(path.exists());
    let listener = StreamListener::bind(&to).unwrap();
    let error = StreamListener::bind(&to).unwrap_err().to_string();
    assert!(error.contains("another process listens there"), "{error}");
    migrate(&listener, &to, options(1), Codec::None);
}

#[test]
fn every_unusable_address_is_reported_with_advice() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().display();
    fs::write(format!("{folder}/plain"), "").unwrap();
    let bind = |text: String| StreamListener::bind(&uri(text)).unwrap_err().to_string();
    let dial = |text: String| connect(&uri(text), &options(1)).unwrap_err().to_string();
    let taken = StreamListener::bind(&uri("tcp:127.0.0.1:0")).unwrap();
    let free = {
        let listener = StreamListener::bind(&uri("tcp:127.0.0.1:0")).unwrap();
        listener.uri().to_string()
    };
    let cases = [
        (bind(taken.uri().to_string()), "the port is in use"),
        (bind(format!("unix:{}", "x".repeat(108))), "longer than 107 bytes"),
        (dial(format!("unix:{}", "x".repeat(108))), "at most 107"),
        (bind(format!("unix:{folder}/plain")), "a file that is not a socket is there"),
        (bind(format!("unix:{folder}/no/socket")), "its directory does not exist"),
        (bind(format!("file:{folder}/nothing")), "there is no such path"),
        (dial(format!("file:{folder}/no/file")), "there is no such path"),
        (dial(format!("unix:{folder}/nobody")), "start the destination first"),
        (dial(free), "start the destination first"),
        (dial("tcp:no.such.host.invalid:1".into()), "is not known"),
    ];
    for (error, advice) in cases {
        assert!(error.contains(advice) && !error.contains('\n'), "{error}");
    }
}

#[test]
fn every_malformed_uri_is_reported_with_the_right_syntax() {
    let cases = [
        ("", "write tcp:HOST:PORT, unix:PATH"),
        ("http://x", "write tcp:HOST:PORT, unix:PATH"),
        ("tcp:host", "a port is missing"),
        ("tcp:host:70000", "0 to 65535"),
        ("tcp:::1:4444", "brackets"),
        ("unix:", "nothing follows"),
        ("file:", "nothing follows"),
        ("exec:", "nothing follows"),
        ("fd:-1", "number of an open file descriptor"),
        ("fd:x", "number of an open file descriptor"),
    ];
    for (text, advice) in cases {
        let error = text.parse::<Uri>().unwrap_err().to_string();
        assert!(error.contains(advice), "{error}");
    }
    for text in ["tcp:host:1", "tcp::4444", "tcp:[::1]:2", "unix:/a b", "file:x:y", "exec:ssh h 'a: b'", "fd:3"] {
        assert_eq!(uri(text).to_string(), text);
    }
}

#[test]
fn cancelling_ends_accept_read_write_and_every_wait() {
    let (_folder, listener, to, _) = listening();
    let forever = || options(1).with_deadline(None).with_timeout(None);
    let waiting = forever();
    thread::scope(|scope| {
        let accept = scope.spawn(|| listener.accept(&waiting));
        waiting.cancel.cancel();
        assert!(matches!(accept.join().unwrap(), Err(StreamError::Cancelled)));
    });
    // The peer does not reply to the header, read or write.
    let dialling = forever();
    thread::scope(|scope| {
        let dial = scope.spawn(|| connect(&to, &dialling));
        dialling.cancel.cancel();
        assert!(matches!(dial.join().unwrap(), Err(StreamError::Cancelled)));
    });
    let (pipe_out, pipe_in) = nix::unistd::pipe().unwrap();
    let (one, _other) = UnixStream::pair().unwrap();
    for number in [one.as_raw_fd(), pipe_in.as_raw_fd()] {
        let writing = forever().with_one_way(true);
        let connection = connect(&Uri::Fd(number), &writing).unwrap();
        thread::scope(|scope| {
            let mut channel = connection.channels[0].clone();
            let write = scope.spawn(move || {
                let failed = (0..).find_map(|_| channel.write_all(&[0; 512]).err());
                StreamError::from(failed.unwrap())
            });
            while connection.channels[0].bytes_sent() < 4096 {
                thread::yield_now();
            }
            writing.cancel.cancel();
            assert!(matches!(write.join().unwrap(), StreamError::Cancelled));
        });
        assert!(matches!(connection.finish(), Err(StreamError::Cancelled) | Ok(())));
    }
    let (quiet, _writer) = nix::unistd::pipe().unwrap();
    let (mute, _other) = UnixStream::pair().unwrap();
    for number in [quiet.as_raw_fd(), mute.as_raw_fd()] {
        let reading = forever();
        let listener = StreamListener::bind(&Uri::Fd(number)).unwrap();
        thread::scope(|scope| {
            let accept = scope.spawn(|| listener.accept(&reading));
            reading.cancel.cancel();
            assert!(matches!(accept.join().unwrap(), Err(StreamError::Cancelled)));
        });
    }
    drop(pipe_out);
}

#[test]
fn a_hanging_peer_times_out_and_a_closed_connection_is_reported() {
    let short = options(1).with_timeout(Some(Duration::from_millis(30))).with_one_way(true);
    let (_kept, pipe) = nix::unistd::pipe().unwrap();
    let (socket, other) = UnixStream::pair().unwrap();
    for number in [pipe.as_raw_fd(), socket.as_raw_fd()] {
        let connection = connect(&Uri::Fd(number), &short).unwrap();
        let error = connection.channels[0].clone().write_all(&vec![0; 64 << 20]).unwrap_err();
        assert!(matches!(StreamError::from(error), StreamError::Timeout(_)));
    }
    drop(other);
    let gone = connect(&Uri::Fd(socket.as_raw_fd()), &short);
    assert!(matches!(gone, Err(StreamError::PeerGone)), "{gone:?}");
}

#[test]
fn an_idle_channel_does_not_time_out_while_another_receives() {
    const TIMEOUT: Duration = Duration::from_secs(3);
    let folder = tempfile::tempdir().unwrap();
    let listener = StreamListener::bind(&unix(folder.path())).unwrap();
    let accepting = options(1).with_timeout(Some(TIMEOUT));
    thread::scope(|scope| {
        let source = scope.spawn(|| connect(listener.uri(), &options(2)).unwrap());
        let connection = listener.accept(&accepting).unwrap();
        let source = source.join().unwrap();
        let read = |number: usize, bytes: usize| {
            let mut channel = connection.channels[number].clone();
            scope.spawn(move || channel.read_exact(&mut vec![0; bytes]).map_err(StreamError::from))
        };
        let (silent, busy) = (read(0, 1), read(1, 20));
        let [mut first, mut second] = [0, 1].map(|number| source.channels[number].clone());
        for _ in 0..20 {
            // The pauses are intended: together they are longer than the timeout.
            thread::sleep(TIMEOUT / 12);
            second.write_all(&[1]).unwrap();
        }
        busy.join().unwrap().unwrap();
        first.write_all(&[1]).unwrap();
        silent.join().unwrap().unwrap();
        // The timeout applies when both are silent.
        let timeout = read(0, 1).join().unwrap();
        assert!(matches!(timeout, Err(StreamError::Timeout(TIMEOUT))), "{timeout:?}");
    });
}

#[test]
fn a_destination_without_a_source_times_out() {
    let (_folder, listener, to, _) = listening();
    let short = options(1).with_deadline(Some(Duration::from_millis(20)));
    let error = listener.accept(&short).unwrap_err().to_string();
    assert!(error.contains("no migration came within 20ms"), "{error}");
    let error = connect(&to, &short).unwrap_err().to_string();
    assert!(error.contains("check that the destination waits for a migration"), "{error}");
}

#[test]
fn the_rate_limit_covers_all_channels_together() {
    let (_folder, listener, to, _) = listening();
    let limited = options(2).with_limiter(RateLimiter::new(Some(10 << 20)));
    let start = Instant::now();
    migrate(&listener, &to, limited, Codec::None);
    // Two thirds of 700 pages are 1.8 MiB; the first tenth of a second's worth is free.
    assert!(start.elapsed() > Duration::from_millis(70), "{:?}", start.elapsed());
}

#[test]
fn a_used_cancel_token_refuses_new_connections() {
    let cancel = CancelToken::new().unwrap();
    cancel.cancel();
    let off = options(1).with_cancel(cancel);
    let result = connect(&uri("exec:cat"), &off);
    assert!(matches!(result, Err(StreamError::Cancelled)), "{result:?}");
}

#[test]
fn a_connection_reset_is_reported_as_peer_gone() {
    let listener = StreamListener::bind(&uri("tcp:127.0.0.1:0")).unwrap();
    let Uri::Tcp { port, .. } = listener.uri() else { panic!() };
    let mut source = TcpStream::connect(("127.0.0.1", *port)).unwrap();
    let header = ConnectionHeader { one_way: true, ..ConnectionHeader::new(MigrationId(7)) };
    source.write_all(&header.encode()).unwrap();
    let connection = listener.accept(&options(1)).unwrap();
    let mut channel = connection.channels[0].clone();
    drop(source);
    let mut reader = connection.readers().remove(0);
    assert!(matches!(reader.next_frame(), Err(StreamError::Ended)));
    let error = loop {
        if let Err(error) = channel.write_all(&[0; 4096]) {
            break StreamError::from(error);
        }
    };
    assert!(matches!(error, StreamError::PeerGone), "{error:?}");
}
