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

/// A sentence on what is missing and what to do, if something is.
pub fn advice() -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let missing = missing(effective(&status)?);
    (!missing.is_empty()).then(|| {
        format!(
            "root lacks the capabilities {} here (docker run --cap-add)",
            missing.join(", ")
        )
    })
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
