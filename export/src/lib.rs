//! Exports of cowvhd disks over the network.
