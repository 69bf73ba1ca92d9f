//! The workspace that benchmarks use: the same for everybody, as large and as compressible as it says.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::Command;

use e2e::surroundings::folder;
use e2e::tree::{Tree, assert_same, describe};
use e2e::workspace::{Scale, generate, many_small, touch_one_percent, touch_sessions};

type Outcome = Result<(), Box<dyn Error>>;

/// Of a tree as a compressed tarball, in bytes.
fn stored(dir: &Path) -> Result<u64, Box<dyn Error>> {
    let output = Command::new("sh")
        .args(["-c", "tar -S -C \"$0\" -c . | zstd -3 -q | wc -c"])
        .arg(dir)
        .output()?;
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}

/// Files of a tree that are new or have other contents than in the one before.
fn changed(before: &Tree, after: &Tree) -> usize {
    let is_other = |(path, node): &(&_, &e2e::tree::Node)| {
        node.kind == "file"
            && before
                .get(*path)
                .is_none_or(|old| old.sha256 != node.sha256)
    };
    after.iter().filter(is_other).count()
}

#[test]
fn workspace_is_the_same_for_the_same_seed() -> Outcome {
    let folder = folder();
    let [one, same, other] = ["one", "same", "other"].map(|name| folder.path().join(name));
    generate(&one, 7, Scale::SMALL)?;
    generate(&same, 7, Scale::SMALL)?;
    generate(&other, 8, Scale::SMALL)?;
    let tree = describe(&one);
    assert_same(&tree, &describe(&same));
    assert_ne!(tree, describe(&other));

    for kind in ["file", "link", "directory"] {
        assert!(tree.values().any(|node| node.kind == kind), "no {kind}");
    }
    assert!(
        tree.values().any(|node| node.same_as.is_some()),
        "no hard link"
    );
    assert!(
        tree.keys().any(|path| path.to_str().is_none()),
        "every name is UTF-8"
    );
    let sparse = &tree[Path::new("unusual/disk.img")];
    assert_eq!(sparse.size, 256 << 20);
    assert!(
        sparse.data.iter().map(|run| run.1).sum::<u64>() < 1 << 20,
        "it is no hole"
    );

    // A twentieth of 12,000 files and 600 MB, half of it when compressed.
    let files = tree.values().filter(|node| node.kind == "file").count();
    assert!((560..=680).contains(&files), "{files} files");
    let data = |node: &e2e::tree::Node| node.data.iter().map(|run| run.1).sum::<u64>();
    let bytes: u64 = tree
        .values()
        .filter(|node| node.same_as.is_none())
        .map(data)
        .sum();
    assert!((24 << 20..36 << 20).contains(&bytes), "{bytes} bytes");
    let stored = stored(&one)?;
    assert!(
        (bytes * 40 / 100..bytes * 60 / 100).contains(&stored),
        "{stored} of {bytes} bytes"
    );
    Ok(())
}

#[test]
fn workspace_is_touched_in_one_file_of_a_hundred() -> Outcome {
    let folder = folder();
    generate(folder.path(), 7, Scale::SMALL)?;
    let before = describe(folder.path());
    touch_one_percent(folder.path(), 1)?;
    let after = describe(folder.path());
    // A file that another name of it brought in counts twice.
    let count = changed(&before, &after);
    assert!((5..=9).contains(&count), "{count} files changed");
    assert_eq!(before.len(), after.len(), "a rename adds nothing");
    touch_sessions(folder.path(), 1)?;
    assert!(changed(&after, &describe(folder.path())) > 4);
    for database in fs::read_dir(folder.path().join("databases"))? {
        let name = database?.file_name();
        assert!(
            name.to_string_lossy().ends_with(".sqlite"),
            "{name:?} is left beside a database"
        );
    }
    Ok(())
}

#[test]
fn small_files_are_as_many_as_asked_for() -> Outcome {
    let folder = folder();
    many_small(folder.path(), 600)?;
    let tree = describe(folder.path());
    let files: Vec<_> = tree.values().filter(|node| node.kind == "file").collect();
    assert_eq!(files.len(), 600);
    assert!(files.iter().all(|node| node.size == 1024));
    Ok(())
}
