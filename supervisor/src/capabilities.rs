//! Which of root's capabilities we lack. A container may be started without them; what then fails later fails for reasons
//! that nobody would guess, so it is said at boot.

/// What it takes to run the gateway as another user and to save its tree, with the numbers of capability.h and what fails without.
const NEEDED: [(u32, &str, &str); 7] = [
    (0, "CHOWN", "giving the root to the gateway's user"),
    (1, "DAC_OVERRIDE", "restoring over an old tree"),
    (3, "FOWNER", "restoring over an old tree"),
    (5, "KILL", "stopping the gateway"),
    (6, "SETGID", "becoming the gateway's user"),
    (7, "SETUID", "becoming the gateway's user"),
    (19, "SYS_PTRACE", "taking snapshots of one instant"),
];

/// The capabilities that this process lacks, and what will fail, each once.
pub fn missing() -> Option<(Vec<&'static str>, Vec<&'static str>)> {
    // The name of a program need not be UTF-8.
    let status = std::fs::read("/proc/self/status").ok()?;
    let (names, mut failing) = judge(effective(&String::from_utf8_lossy(&status))?);
    failing.dedup();
    (!names.is_empty()).then_some((names, failing))
}

fn effective(status: &str) -> Option<u64> {
    let mut lines = status.lines();
    let set = lines.find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(set.trim(), 16).ok()
}

fn judge(effective: u64) -> (Vec<&'static str>, Vec<&'static str>) {
    let is_missing = |(number, ..): &&(u32, &str, &str)| effective >> number & 1 == 0;
    let missing = NEEDED.iter().filter(is_missing);
    missing.map(|(_, name, action)| (*name, *action)).unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        let dockers = effective("Name:\tx\nCapInh:\t0000000000000000\nCapEff:\t00000000a80425fb\n");
        for (set, names, failing) in [
            // Docker's own default has all but one.
            (
                dockers.expect("is a set"),
                vec!["SYS_PTRACE"],
                vec!["taking snapshots of one instant"],
            ),
            (
                0b1100_1011 | 1 << 19,
                vec!["KILL"],
                vec!["stopping the gateway"],
            ),
            (u64::MAX, vec![], vec![]),
        ] {
            assert_eq!(judge(set), (names, failing), "{set:x}");
        }
        assert_eq!(effective("Name:\tx\n"), None);
    }
}
