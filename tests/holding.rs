//! Nobody who is held for a snapshot notices, nobody escapes, and whoever cannot be held makes the snapshot say so.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use e2e::agent::{Place, Running};
use e2e::held::{Held, state};
use e2e::surroundings::around;
use e2e::wait::until;
use rustix::process::Signal;
use serde_json::Value;

/// Snapshots after which a terminal still has to work. SIGSTOP put its job into the background in half of all tries.
const HOLDS: u32 = 20;

/// A walk over so many files takes long enough for what happens in the pause.
const MANY: u32 = 1500;

/// The job answers each line, so a job in the background or a stopped one does not pass for it.
const JOB: &str = "sed -u s/^/got:/";

fn nobody_notices(typed: &str, command: &[&str]) {
    let Some(mut held) = Held::new(&Place::directory()) else {
        return;
    };
    let program = command[0];
    let is_there = Command::new("sh")
        .args(["-c", "command -v \"$0\"", program])
        .stdout(Stdio::null())
        .status();
    assert!(
        is_there.is_ok_and(|status| status.success()),
        "{program} is not installed: see the target `test` in the Makefile"
    );
    let arguments = [&[typed], command].concat();
    let terminal = held.start("terminal", &arguments);
    for number in 0..HOLDS {
        held.hold();
        let answer = held.ask(terminal, &number.to_string());
        assert_eq!(answer["isAnswered"], true, "{number}: {answer}");
        let text = answer["text"].as_str().expect("it is a text");
        assert!(!text.to_lowercase().contains("stopped"), "{number}: {text}");
    }
}

#[test]
fn a_job_in_the_foreground_of_bash_stays_there() {
    nobody_notices(JOB, &["bash", "--norc", "-i"]);
}

#[test]
fn a_job_in_the_foreground_of_dash_stays_there() {
    nobody_notices(JOB, &["dash", "-i"]);
}

#[test]
fn a_job_in_the_foreground_of_zsh_stays_there() {
    nobody_notices(JOB, &["zsh", "-f", "-i"]);
}

#[test]
fn what_script_records_goes_on() {
    nobody_notices("", &["script", "-q", "-c", JOB, "/dev/null"]);
}

#[test]
fn a_pane_of_tmux_goes_on() {
    let tmux = ["tmux", "-f", "/dev/null", "new-session", "bash --norc -i"];
    nobody_notices(JOB, &tmux);
}

/// Starts a backup, and does something while everybody is held: again until it is sure that they were held all the time.
fn in_the_pause<T>(held: &mut Held, mut work: impl FnMut(&mut Held) -> T) -> T {
    loop {
        let arguments = held.arguments("10s");
        let mut running = held.host.start(&arguments);
        let mut done = None;
        while done.is_none() && running.is_running() {
            if held.is_held() {
                let result = work(held);
                done = Some((result, held.is_held()));
            }
        }
        let _ = running.wait().expect(0);
        held.assert_nobody_is_held();
        if let Some((result, true)) = done {
            return result;
        }
    }
}

#[test]
fn signals_that_arrive_meanwhile_are_delivered_afterwards() {
    let Some(mut held) = Held::new(&Place::directory()) else {
        return;
    };
    held.fill(MANY);
    let receiver = held.start("signals", &[]);
    let pid = held.pid(receiver).to_string();
    let sender = held.start("send", &[&pid]);
    let mut sent = Vec::new();
    for _ in 0..3 {
        in_the_pause(&mut held, |held| {
            let numbers = held.ask(sender, "");
            sent.extend(numbers.as_array().expect("it is a list").clone());
        });
        // Those of before are all there, or the next ones might be merged with them.
        let counts = all_arrive(&mut held, receiver, sent.len());
        for number in &sent {
            let expected = sent.iter().filter(|other| *other == number).count();
            assert_eq!(counts[number.to_string()], expected, "{number}: {counts}");
        }
    }
}

#[test]
fn no_signal_is_lost_at_the_beginning_and_the_end_of_a_pause() {
    let Some(mut held) = Held::new(&Place::directory()) else {
        return;
    };
    let receiver = held.start("signals", &[]);
    let pid = held.pid(receiver).to_string();
    let sender = held.start("stream", &[&pid]);
    for _ in 0..10 {
        held.hold();
    }
    // The kernel stops it for each signal that comes between the two calls that hold it.
    for _ in 0..3 {
        let mut command = with_fault(&mut held, "10s", &[], "ptrace:delay_exit=20ms");
        let answer = Running::start(&mut command).wait().expect(0).json();
        assert!(answer["pauseMs"].is_u64(), "{answer}");
    }
    let sent = held.ask(sender, "").as_u64().expect("it is a number");
    assert!(sent > 0);
    let sent = usize::try_from(sent).expect("it is not that many");
    all_arrive(&mut held, receiver, sent);
}

/// Waits until so many signals have arrived, and no more: how many of each.
fn all_arrive(held: &mut Held, receiver: usize, sent: usize) -> Value {
    let mut counts = Value::Null;
    until("every signal arrives", || {
        counts = held.ask(receiver, "");
        let counts = counts.as_object().expect("it is a table").values();
        let arrived: u64 = counts.filter_map(Value::as_u64).sum();
        arrived == sent as u64
    });
    counts
}

#[test]
fn a_stopped_process_stays_stopped() {
    let Some(mut held) = Held::new(&Place::directory()) else {
        return;
    };
    let stopped = held.start("stopped", &[]);
    let process = Path::new("/proc").join(held.pid(stopped).to_string());
    until("it has stopped itself", || state(&process) == Some('T'));
    for _ in 0..5 {
        held.hold();
        assert_eq!(state(&process), Some('T'));
    }
}

#[test]
fn a_parent_that_waits_for_its_child_in_vfork_is_held_and_goes_on() {
    let Some(mut held) = Held::new(&Place::directory()) else {
        return;
    };
    let fifo = held.host.folder.path().join("fifo");
    let made = Command::new("mkfifo")
        .args(["-m", "666"])
        .arg(&fifo)
        .status();
    assert!(made.is_ok_and(|status| status.success()));
    let parent = held.start("vfork", &[fifo.to_str().expect("it is UTF-8")]);
    let process = Path::new("/proc").join(held.pid(parent).to_string());
    until("it waits for its child", || state(&process) == Some('D'));
    for _ in 0..5 {
        held.hold();
        assert_eq!(state(&process), Some('D'));
    }
    let opened = fs::File::options().write(true).open(&fifo);
    opened.expect("the child opens its other end");
    assert_eq!(held.answer(parent), "returned");
}

/// Snapshots of one instant of chains of numbers, while they are written in different ways.
fn nobody_escapes(starts: &[(&str, &[&str])], others: &[&str]) {
    let Some(mut held) = Held::new(&Place::directory()) else {
        return;
    };
    held.fill(200);
    let root = held.host.root.display().to_string();
    let mut first = None;
    for (number, (mode, arguments)) in starts.iter().enumerate() {
        let name = number.to_string();
        let member = held.start(mode, &[&[root.as_str(), &name], *arguments].concat());
        first.get_or_insert(held.pid(member).to_string());
    }
    let first = first.expect("somebody writes");
    for mode in others {
        held.start(mode, &[&first]);
    }
    let mut instants = 0;
    for _ in 0..15 {
        let answer = held.backup("10s");
        held.assert_nobody_is_held();
        if answer["consistency"] != "instant" {
            continue;
        }
        instants += 1;
        for (number, (mode, _)) in starts.iter().enumerate() {
            let torn = held.torn(&answer["snapshot"], &number.to_string());
            assert_eq!(torn, None, "{mode}: {answer}");
        }
    }
    assert!(instants > 0, "no snapshot was of one instant");
}

#[test]
fn a_process_is_held_whatever_its_name_is() {
    // `openclaw-aaaa` and half of a letter; what looks like the end of a name; a line feed and a user.
    let titles = [
        "6f70656e636c61772d6161616161c3",
        "29205a2028",
        "780a5569643a0930",
    ];
    let starts: Vec<[&str; 1]> = titles.into_iter().map(|title| [title]).collect();
    let starts: Vec<(&str, &[&str])> = starts.iter().map(|title| ("writer", &title[..])).collect();
    nobody_escapes(&starts, &[]);
}

#[test]
fn a_process_is_held_that_may_become_the_user_again() {
    nobody_escapes(&[("saved", &[])], &[]);
}

#[test]
fn threads_and_processes_are_held_that_are_born_meanwhile() {
    nobody_escapes(&[("births", &[]), ("births", &[]), ("writer", &[])], &[]);
}

#[test]
fn a_process_is_held_that_somebody_else_continues_all_the_time() {
    nobody_escapes(&[("writer", &[])], &["continuer"]);
}

#[test]
fn a_chain_of_forks_is_held_or_the_snapshot_does_not_claim_it() {
    let Some(mut held) = Held::new(&Place::directory()) else {
        return;
    };
    let root = held.host.root.display().to_string();
    held.start("forkchain", &[&root, "0"]);
    for _ in 0..15 {
        let answer = held.backup("500ms");
        held.assert_nobody_is_held();
        let torn = held.torn(&answer["snapshot"], "0");
        let claims = answer["consistency"] == "instant";
        assert!(torn.is_none() || !claims, "{torn:?} {answer}");
    }
}

#[test]
fn a_thousand_processes_are_held_at_once() {
    let Some(mut held) = Held::new(&Place::directory()) else {
        return;
    };
    held.start("sleepers", &["1000"]);
    held.hold();
}

#[test]
fn a_debugger_keeps_its_process_and_the_snapshot_names_both() {
    let Some(mut held) = Held::new(&Place::directory()) else {
        return;
    };
    let root = held.host.root.display().to_string();
    held.start("writer", &[&root, "0"]);
    let traced = held.start("sleepers", &["1"]);
    let pid = held.pid(traced);
    let mut debugger = Command::new("strace")
        .args(["-qq", "-o", "/dev/null", "-p", &pid.to_string()])
        .spawn()
        .expect("strace is installed: see the target `test` in the Makefile");
    let is_traced = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        status.contains(&format!("TracerPid:\t{}\n", debugger.id()))
    };
    until("the debugger is there", is_traced);
    for _ in 0..3 {
        let arguments = held.arguments("10s");
        let mut command = held.host.command(&arguments);
        let reason = held.refused(&mut command);
        let expected = format!(
            "process {} traces process {pid} of the gateway",
            debugger.id()
        );
        assert!(reason.starts_with(&expected), "{expected}: {reason}");
        assert!(is_traced());
    }
    debugger.kill().expect("it is our child");
    debugger.wait().expect("it is our child");
    held.hold();
}

/// The agent behind a shell that prepares something for it.
fn within(held: &mut Held, pause: &str, prepare: &str, program: &str) -> Command {
    let arguments = held.arguments(pause);
    let agent = held.host.command(&arguments);
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-c"])
        .arg(format!("{prepare} && exec {program} \"$0\" \"$@\""));
    around(command, &agent)
}

const HIDES: &str = "mount -t proc -o hidepid=2 proc /proc";
const UNABLE: &str = "setpriv --bounding-set=-sys_ptrace --inh-caps=-sys_ptrace";

#[test]
fn without_the_capability_a_snapshot_says_so_whatever_proc_shows() {
    let Some(mut held) = Held::new(&Place::directory()) else {
        return;
    };
    let root = held.host.root.display().to_string();
    held.start("writer", &[&root, "0"]);
    for prepare in ["true", HIDES] {
        let mut command = within(&mut held, "10s", prepare, UNABLE);
        let reason = held.refused(&mut command);
        assert!(reason.contains("--cap-add SYS_PTRACE"), "{reason}");
    }
}

#[test]
fn with_the_capability_nobody_hides_in_proc() {
    let Some(mut held) = Held::new(&Place::directory()) else {
        return;
    };
    held.fill(200);
    let root = held.host.root.display().to_string();
    held.start("writer", &[&root, "0"]);
    for _ in 0..5 {
        let mut command = within(&mut held, "10s", HIDES, "");
        let answer = Running::start(&mut command).wait().expect(0).json();
        assert_eq!(answer["consistency"], "instant", "{answer}");
        assert_eq!(held.torn(&answer["snapshot"], "0"), None);
    }
}

#[test]
fn a_proc_that_shows_others_is_no_proof_that_nobody_runs() {
    let Some(mut held) = Held::new(&Place::directory()) else {
        return;
    };
    let root = held.host.root.display().to_string();
    held.start("writer", &[&root, "0"]);
    let empty = "mount -t tmpfs tmpfs /proc";
    for (prepare, program) in [(empty, ""), ("true", "unshare --pid --fork")] {
        let mut command = within(&mut held, "10s", prepare, program);
        let reason = held.refused(&mut command);
        assert!(reason.contains("cannot read /proc: "), "{reason}");
    }
}

#[test]
fn with_few_descriptors_a_snapshot_is_whole_or_does_not_claim_it() {
    let Some(mut held) = Held::new(&Place::directory()) else {
        return;
    };
    held.fill(200);
    let root = held.host.root.display().to_string();
    held.start("writer", &[&root, "0"]);
    for count in [8, 12, 14, 16, 18, 20, 24, 32] {
        let mut command = within(&mut held, "10s", &format!("ulimit -n {count}"), "");
        let outcome = Running::start(&mut command).wait();
        held.assert_nobody_is_held();
        if outcome.code != Some(0) {
            assert!(count < 32, "{outcome:?}");
            continue;
        }
        let answer = outcome.json();
        if answer["consistency"] == "instant" {
            let torn = held.torn(&answer["snapshot"], "0");
            assert_eq!(torn, None, "{count}: {answer}");
        }
    }
}

/// A backup under strace, which does something to one system call, on these paths if there are any.
fn with_fault(held: &mut Held, pause: &str, paths: &[String], fault: &str) -> Command {
    let arguments = held.arguments(pause);
    let agent = held.host.command(&arguments);
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "/dev/null"]);
    let call = fault.split_once(':').map(|(call, _)| call);
    command.args(["-e", call.expect("a fault names a call")]);
    for path in paths {
        command.args(["-P", path]);
    }
    command.args(["-e", &format!("inject={fault}")]);
    around(command, &agent)
}

#[test]
fn what_cannot_be_read_in_proc_is_not_taken_for_held() {
    let Some(mut held) = Held::new(&Place::directory()) else {
        return;
    };
    let root = held.host.root.display().to_string();
    let writer = held.start("writer", &[&root, "0"]);
    let process = format!("/proc/{}", held.pid(writer));
    let thread = format!("{process}/task/{}", held.pid(writer));
    for path in [
        "/proc".to_owned(),
        format!("{process}/task"),
        format!("{thread}/status"),
        format!("{thread}/stat"),
    ] {
        for errno in ["EMFILE", "ENFILE", "ENOMEM", "EACCES", "EIO"] {
            let fault = format!("openat:error={errno}");
            let mut command = with_fault(&mut held, "10s", std::slice::from_ref(&path), &fault);
            let reason = held.refused(&mut command);
            let said = format!("cannot read {path}: ");
            assert!(reason.contains(&said), "{errno}: {reason}");
        }
    }
    held.hold();
}

#[test]
fn a_reader_that_hangs_holds_nobody_longer_than_it_may() {
    let Some(mut held) = Held::new(&Place::directory()) else {
        return;
    };
    let root = held.host.root.display().to_string();
    held.start("writer", &[&root, "0"]);
    let hangs = [format!("{root}/new")];
    // Far longer than the test waits.
    let mut command = with_fault(&mut held, "1s", &hangs, "pread64:delay_enter=3600s");
    let mut running = Running::start(&mut command);
    until("everybody is held", || {
        assert!(
            running.is_running(),
            "it did not hang: is strace installed?"
        );
        held.is_held()
    });
    until("everybody goes on", || !held.is_held());
    held.assert_nobody_is_held();
    assert!(running.is_running(), "the reader did not hang");
    // Without strace nothing hangs any more.
    running.signal(Signal::KILL);
    let _ = running.wait();

    let mut command = with_fault(&mut held, "300ms", &hangs, "pread64:delay_enter=1s");
    let outcome = Running::start(&mut command).wait().expect(0);
    let answer = outcome.json();
    // A machine that is busy may let the tracer end late, and then it says so.
    let is_late = answer["pauseMs"].as_u64().is_some_and(|pause| pause > 300);
    assert!(
        !is_late || answer["consistency"] == "per-file",
        "{outcome:?}"
    );
    // A later round need not read the file that hangs.
    let claims = answer["consistency"] == "instant";
    let torn = held.torn(&answer["snapshot"], "0");
    assert!(torn.is_none() || !claims, "{torn:?} {outcome:?}");
}
