//! Which of root's capabilities this process lacks: a container may be started without them, and then "Operation not permitted"
//! alone tells an operator nothing.

/// What the work takes, with the numbers of capability.h: becoming the gateway's user for file work; making and removing
/// the working directory inside of a root that is that user's; giving the restored tree to that user; setting its mode.
const NEEDED: [(u32, &str); 5] = [
    (0, "CHOWN"),
    (1, "DAC_OVERRIDE"),
    (3, "FOWNER"),
    (6, "SETGID"),
    (7, "SETUID"),
];

const SYS_PTRACE: u32 = 19;

/// A sentence on what is missing and what to do, if something is.
pub fn advice() -> Option<String> {
    let missing = missing(effective(&status()?)?);
    (!missing.is_empty()).then(|| {
        format!(
            "root lacks the capabilities {} here (docker run --cap-add)",
            missing.join(", ")
        )
    })
}

/// Whether the calling thread may hold processes of other users, and see them whatever the options of /proc. Nothing but a
/// snapshot of one instant takes that, so it is not among what is needed.
pub fn can_trace() -> bool {
    let effective = status().and_then(|status| effective(&status));
    effective.is_some_and(|effective| effective >> SYS_PTRACE & 1 == 1)
}

/// Our own name may have been cut in the middle of a letter.
fn status() -> Option<String> {
    let status = std::fs::read("/proc/thread-self/status").ok()?;
    Some(String::from_utf8_lossy(&status).into_owned())
}

fn effective(status: &str) -> Option<u64> {
    let mut lines = status.lines();
    let set = lines.find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(set.trim(), 16).ok()
}

fn missing(effective: u64) -> Vec<&'static str> {
    let is_missing = |(number, _): &&(u32, &str)| effective >> number & 1 == 0;
    NEEDED
        .iter()
        .filter(is_missing)
        .map(|(_, name)| *name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_capabilities_are_named() {
        // Docker's own default has all of them.
        let dockers = effective("Name:\tx\nCapInh:\t0000000000000000\nCapEff:\t00000000a80425fb\n");
        assert_eq!(dockers.map(missing), Some(Vec::new()));
        assert_eq!(missing(0b1100_0000), ["CHOWN", "DAC_OVERRIDE", "FOWNER"]);
        assert_eq!(effective("Name:\tx\n"), None);
    }
}
