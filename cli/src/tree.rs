//! `cowvhd tree`: all layers of the tree that a disk is part of.

use crate::failure::Failure;
use crate::output;
use crate::parents::Folders;
use crate::size::Human;
use cowvhd::snapshot::{LayerState, TreeLayer, tree};
use cowvhd::vhd::{DiskType, Timestamp};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// The version of the JSON object.
const SCHEMA: u32 = 1;

/// Shows the tree that a disk is part of: its layers, and all snapshots, clones and disks over any of them.
///
/// The layer beneath all comes first. What goes on in the same column is one chain; the chain of the disk is the leftmost one. "@" is the
/// disk. Works while layers are in use.
#[derive(Debug, clap::Args)]
pub(crate) struct Tree {
    /// The disk's file.
    file: PathBuf,
    /// Prints one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    folders: Folders,
}

/// The JSON object; docs/tool.md describes it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Report {
    schema: u32,
    filename: String,
    layers: Vec<Layer>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Layer {
    filename: Option<String>,
    unique_id: String,
    parent: Option<usize>,
    registered: bool,
    this: bool,
    sealed: bool,
    snapshot: Option<String>,
    vhd_type: Option<String>,
    virtual_size: Option<u64>,
    actual_size: Option<u64>,
    file_size: Option<u64>,
    changed: Option<String>,
    missing: Option<String>,
}

impl Tree {
    pub(crate) fn run(&self) -> Result<(), Failure> {
        let layers = tree(&self.folders.options(), &self.file)?;
        if !self.json {
            let folder = self.file.parent().unwrap_or(Path::new(""));
            return output::print(&table(&Graph::new(&layers).lines(), &layers, folder));
        }
        let filename = self.file.to_string_lossy().into_owned();
        let layers = layers.iter().map(Layer::new).collect();
        output::print_json(&Report { schema: SCHEMA, filename, layers })
    }
}

impl Layer {
    fn new(layer: &TreeLayer) -> Self {
        let state = layer.state.as_ref().ok();
        let path = layer.path.to_string_lossy().into_owned();
        Layer {
            filename: Some(path).filter(|path| !path.is_empty()),
            unique_id: layer.unique_id.to_string(),
            parent: layer.parent,
            registered: layer.registered,
            this: layer.is_disk,
            sealed: state.is_some_and(|state| state.sealed),
            snapshot: state.and_then(|state| state.snapshot.clone()),
            vhd_type: state.map(|state| state.disk_type.to_string()),
            virtual_size: state.map(|state| state.virtual_size),
            actual_size: state.map(|state| state.allocated_bytes),
            file_size: state.map(|state| state.file_bytes),
            changed: state.map(changed),
            missing: layer.state.as_ref().err().cloned(),
        }
    }
}

fn changed(state: &LayerState) -> String {
    Timestamp::from_unix_seconds(state.changed.seconds).to_string()
}

/// The layers as they hang together.
struct Graph {
    children: Vec<Vec<usize>>,
    /// The child of each layer that goes on in its column.
    main: Vec<Option<usize>>,
    is_disk: Vec<bool>,
}

impl Graph {
    fn new(layers: &[TreeLayer]) -> Self {
        let mut children = vec![Vec::new(); layers.len()];
        for (number, layer) in layers.iter().enumerate() {
            if let Some(siblings) = layer.parent.and_then(|parent| children.get_mut(parent)) {
                siblings.push(number);
            }
        }
        // Towards the disk, or else where most is: so columns are few.
        let mut weight: Vec<(bool, usize)> = layers.iter().map(|layer| (layer.is_disk, 1)).collect();
        for (number, layer) in layers.iter().enumerate().rev() {
            let own = weight.get(number).copied().unwrap_or_default();
            if let Some(parent) = layer.parent.and_then(|parent| weight.get_mut(parent)) {
                *parent = (parent.0 | own.0, parent.1 + own.1);
            }
        }
        let heaviest = |children: &Vec<usize>| {
            children
                .iter()
                .copied()
                .max_by_key(|&child| (weight.get(child).copied(), std::cmp::Reverse(child)))
        };
        let main = children.iter().map(heaviest).collect();
        Graph { children, main, is_disk: layers.iter().map(|layer| layer.is_disk).collect() }
    }

    /// Each layer with what is drawn before its name, in the order of the lines.
    fn lines(&self) -> Vec<(String, usize)> {
        let mut lines = Vec::new();
        if !self.main.is_empty() {
            self.chain(0, "", "", &mut lines);
        }
        lines
    }

    /// A chain from its first layer on, in a column of its own.
    fn chain(&self, first: usize, first_prefix: &str, prefix: &str, lines: &mut Vec<(String, usize)>) {
        let mut next = Some(first);
        let mut before = first_prefix;
        while let Some(number) = next {
            let marker = if self.is_disk.get(number) == Some(&true) { '@' } else { '*' };
            lines.push((format!("{before}{marker} "), number));
            before = prefix;
            next = self.main.get(number).copied().flatten();
            let siblings = self.children.get(number).into_iter().flatten();
            for &child in siblings.filter(|&&child| Some(child) != next) {
                // The column goes on: there is another child.
                self.chain(child, &format!("{prefix}\u{251c}\u{2500}"), &format!("{prefix}\u{2502} "), lines);
            }
        }
    }
}

/// What a layer is, in a few words.
fn kind(layer: &TreeLayer) -> String {
    match &layer.state {
        Err(_) => "missing".into(),
        Ok(LayerState { snapshot: Some(name), .. }) => format!("snapshot {name}"),
        Ok(LayerState { sealed: true, .. }) => "sealed".into(),
        Ok(LayerState { disk_type: DiskType::Fixed, .. }) => "fixed disk".into(),
        Ok(_) => "disk".into(),
    }
}

fn table(lines: &[(String, usize)], layers: &[TreeLayer], folder: &Path) -> String {
    let mut rows = vec![["LAYER".to_string(), "KIND".into(), "CHANGED".into(), "USED".into()]];
    for (graph, number) in lines {
        let Some(layer) = layers.get(*number) else { continue };
        let path = layer.path.strip_prefix(folder).unwrap_or(&layer.path).display().to_string();
        let name = if path.is_empty() { format!("id {}", layer.unique_id) } else { path };
        let (changed, used) = match &layer.state {
            Ok(state) => (changed(state), Human(state.allocated_bytes).to_string()),
            Err(why) => (String::new(), why.clone()),
        };
        let unregistered = layer.parent.is_some() && !layer.registered && layer.state.is_ok();
        let note = if unregistered { ", not registered" } else { "" };
        rows.push([format!("{graph}{name}"), format!("{}{note}", kind(layer)), changed, used]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let (layer, kind, changed) = (width(0), width(1), width(2));
    let line = |[a, b, c, d]: &[String; 4]| format!("{a:layer$}  {b:kind$}  {c:changed$}  {d}\n");
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use cowvhd::vhd::UniqueId;

    #[test]
    fn chains_keep_their_column() {
        let layer = |number: usize, parent| TreeLayer {
            path: format!("{number}").into(),
            unique_id: UniqueId::from_bytes([number as u8; 16]),
            parent,
            registered: true,
            is_disk: number == 2,
            state: Err("not there".into()),
        };
        // 0 under 1 and 3; 1 under 2, the disk; 3 under 4 and 5; 5 under 6.
        let parents = [None, Some(0), Some(1), Some(0), Some(3), Some(3), Some(5)];
        let layers: Vec<_> =
            parents.iter().enumerate().map(|(number, &parent)| layer(number, parent)).collect();
        let lines = Graph::new(&layers).lines();
        let text: String = lines.iter().map(|(graph, number)| format!("{graph}{number}\n")).collect();
        assert_eq!(text, "* 0\n├─* 3\n│ ├─* 4\n│ * 5\n│ * 6\n* 1\n@ 2\n");
        assert!(table(&lines, &layers, Path::new("")).contains("not there"));
        assert_eq!(Graph::new(&[]).lines(), []);
    }
}
