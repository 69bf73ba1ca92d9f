//! When memory runs out: the gateway goes first, and whether it did can be told from a crash.
//!
//! The kernel counts the processes that it killed, per control group where there are any, and counts before it kills: a
//! counter read before the start and after the exit decides. No file of it has to be there.

use std::ffi::CStr;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::write;

use crate::reaper::Exit;

const SCORE: &CStr = c"/proc/self/oom_score_adj";

/// By how much the gateway comes before us, in thousandths of all memory. Anybody may step forward; back, only with the
/// capability `SYS_RESOURCE`.
const AHEAD: i32 = 500;
const MAX_SCORE: i32 = 1000;

/// The longest number there can be, and a NUL to fill up.
type Score = [u8; 5];

/// Ours, which the operator may have chosen, and `AHEAD`.
pub fn score_of_gateway() -> Score {
    let path = SCORE.to_str().expect("is ASCII");
    let ours = fs::read_to_string(path).ok();
    let ours = ours.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let mut score = Score::default();
    let _ = write!(&mut score[..], "{}", MAX_SCORE.min(AHEAD + ours));
    score
}

/// Sets the score of this process. Without an allocation: it is called between fork and exec. A failure costs no more than
/// the place in that order.
pub fn set_score(score: Score) {
    let digits = score.iter().take_while(|byte| **byte != 0).count();
    let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    if let Ok(file) = open(SCORE, flags, Mode::empty()) {
        let _ = write(&file, &score[..digits]);
    }
}

/// How often the kernel has killed for memory where we live.
pub struct Kills {
    counter: Option<PathBuf>,
    before: u64,
}

impl Kills {
    pub fn new() -> Self {
        // The name of a group need not be UTF-8.
        let groups = fs::read("/proc/self/cgroup").unwrap_or_default();
        let mut paths = candidates(&String::from_utf8_lossy(&groups)).into_iter();
        Self {
            counter: paths.find(|path| read(path).is_some()),
            before: 0,
        }
    }

    /// To be called before each start.
    pub fn remember(&mut self) {
        self.before = self.now();
    }

    /// Whether this exit, which we did not ask for, was such a kill.
    pub fn explain(&self, exit: Exit) -> bool {
        exit.signal == Some(Signal::SIGKILL as i32) && self.now() > self.before
    }

    fn now(&self) -> u64 {
        self.counter.as_deref().and_then(read).unwrap_or_default()
    }
}

/// Where the counter may be, by our line in `/proc/self/cgroup`: of the memory controller (v1), else of the one hierarchy
/// (v2). In a container its own group may be mounted as the top. Last, the whole machine's.
fn candidates(groups: &str) -> Vec<PathBuf> {
    let fields = |line: &'_ str| {
        let mut parts = line.splitn(3, ':').skip(1).map(str::to_owned);
        Some((parts.next()?, parts.next()?))
    };
    let mut paths = Vec::new();
    for (controllers, group) in groups.lines().filter_map(fields) {
        let (top, file) = match controllers.as_str() {
            "" => ("/sys/fs/cgroup", "memory.events"),
            list if list.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.oom_control")
            }
            _ => continue,
        };
        let group = Path::new(top).join(group.trim_start_matches('/'));
        paths.extend([group.join(file), Path::new(top).join(file)]);
    }
    paths.push("/proc/vmstat".into());
    paths
}

fn read(counter: &Path) -> Option<u64> {
    parse(&fs::read_to_string(counter).ok()?)
}

/// All of these files have one line for it, with the same name.
fn parse(text: &str) -> Option<u64> {
    let mut lines = text.lines();
    let count = lines.find_map(|line| line.strip_prefix("oom_kill "))?;
    count.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_read_from_each_kind_of_file() {
        let v2 = "low 0\nhigh 0\nmax 31\noom 2\noom_kill 1\noom_group_kill 0\n";
        let v1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n";
        let machine = "pgmajfault 3\noom_kill 7\nnuma_hit 5\n";
        for (text, count) in [
            (v2, Some(1)),
            (v1, Some(3)),
            (machine, Some(7)),
            // v1 before Linux 4.13.
            ("oom_kill_disable 0\nunder_oom 0\n", None),
            ("", None),
        ] {
            assert_eq!(parse(text), count, "{text:?}");
        }
    }

    #[test]
    fn the_counter_is_looked_for_in_our_own_group_first() {
        let found = |groups: &str| {
            let paths = candidates(groups).into_iter();
            paths
                .map(|path| path.display().to_string())
                .collect::<Vec<_>>()
        };
        let v2 = "/sys/fs/cgroup/memory.events";
        let v1 = "/sys/fs/cgroup/memory/memory.oom_control";
        assert_eq!(found("0::/\n"), [v2, v2, "/proc/vmstat"]);
        assert_eq!(
            found("0::/a.slice/b:c\n"),
            [
                "/sys/fs/cgroup/a.slice/b:c/memory.events",
                v2,
                "/proc/vmstat"
            ]
        );
        // Both at once, where the one hierarchy has no controllers.
        assert_eq!(
            found("5:cpu,memory:/docker/1f\n2:cpuset:/docker/1f\n0::/docker/1f\n"),
            [
                "/sys/fs/cgroup/memory/docker/1f/memory.oom_control",
                v1,
                "/sys/fs/cgroup/docker/1f/memory.events",
                v2,
                "/proc/vmstat"
            ]
        );
        assert_eq!(found("junk\n"), ["/proc/vmstat"]);
    }

    #[test]
    fn only_a_sigkill_with_a_higher_count_is_for_memory() {
        let file = std::env::temp_dir().join(format!("supervisor-oom-{}", std::process::id()));
        fs::write(&file, "oom_kill 1\n").expect("can write");
        let mut kills = Kills {
            counter: Some(file.clone()),
            before: 0,
        };
        let by = |signal| Exit {
            code: None,
            signal: Some(signal),
        };
        kills.remember();
        assert!(!kills.explain(by(9)));
        fs::write(&file, "oom_kill 2\n").expect("can write");
        assert!(kills.explain(by(9)) && !kills.explain(by(15)));
        kills.remember();
        assert!(!kills.explain(by(9)));
        fs::remove_file(&file).expect("is there");
        assert!(!kills.explain(by(9)));
    }
}
