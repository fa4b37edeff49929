// Package tools pins the programs that Thaw is built, checked and tested with, in
// a module of its own so that their dependencies never reach the product's.
//
// "make tools" builds them into bin/. containerd, its shim and ctr are built from
// source because the end-to-end tests need a containerd of a known version beside
// whatever the machine runs. To move to a new version: go get PACKAGE@VERSION here.
package tools
