// Package archtest holds the rules that the design makes about the code itself: who
// may import whom, what packages may be called, how long files may be.
package archtest

import (
	"bufio"
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const module = "github.com/thaw-project/thaw"

type pkg struct {
	ImportPath   string
	Name         string
	Dir          string
	Doc          string
	GoFiles      []string
	TestGoFiles  []string
	XTestGoFiles []string
	Imports      []string
	Deps         []string
	Standard     bool
}

func list(t *testing.T) []pkg {
	t.Helper()
	c := exec.Command("go", "list", "-e", "-json=ImportPath,Name,Dir,Doc,GoFiles,TestGoFiles,XTestGoFiles,Imports,Deps", module+"/...")
	c.Stderr = os.Stderr
	out, err := c.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var packages []pkg
	d := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p pkg
		if err := d.Decode(&p); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
	if len(packages) < 10 {
		t.Fatalf("go list found %d packages of the module", len(packages))
	}
	return packages
}

// rule forbids packages of the module below From to import, directly or through
// others, what is below one of Forbid. Paths without a dot in the first element are
// of this module.
type rule struct {
	from   string
	direct bool // only direct imports count: the seam in between is what is allowed
	except []string
	forbid []string
	why    string
}

var rules = []rule{
	{from: "lvol", forbid: []string{"google.golang.org/grpc", "k8s.io", "github.com/containerd/containerd", "github.com/google/go-containerregistry"},
		why: "the store knows bytes and volumes, not who asks for them"},
	{from: "lvol", forbid: []string{"qcow2", "target", "node", "image", "attacher", "daemon"}, why: "the store is at the bottom"},
	{from: "qcow2", forbid: []string{"google.golang.org/grpc", "k8s.io", "github.com/containerd/containerd", "lvol", "node", "image", "attacher"},
		why: "a file format knows its file and its backing device"},
	{from: "redo", forbid: []string{"google.golang.org/grpc", "github.com/containerd/containerd", "lvol", "qcow2", "node"}, why: "a log knows records"},
	{from: "target/bdev", forbid: []string{"google.golang.org/grpc", "lvol", "qcow2", "node"}, why: "the interface knows no implementation"},
	{from: "node/present", direct: true, forbid: []string{"lvol", "qcow2", "attacher", "node/snapshotter", "node/imagemgmt", "image"},
		why: "front-ends see only interfaces of target/bdev"},
	{from: "node/present/choose", forbid: []string{"node/present/fabrics", "node/present/fuse", "node/present/nbd", "node/present/ublk", "target/nbd", "target/nvmf", "target/ublk"},
		why: "who chooses is handed the presenters and knows none"},
	{from: "node/present/fabrics", forbid: []string{"attacher", "node/remote", "nvme", "target/nvmf"}, why: "how a block is exported is somebody else's, and the kernel moves the data"},
	{from: "node/present/nvmesys", forbid: []string{"google.golang.org/grpc", "attacher", "node/remote", "nvme", "opi", "target"}, why: "what the kernel tells of NVMe is the same whoever asks"},
	{from: "node/present/pcie", forbid: []string{"google.golang.org/grpc", "attacher", "opi", "spdk", "node/remote", "node/imagemgmt", "nvme", "lvol", "qcow2"},
		why: "who finds a drive must not know who asked the card to show it"},
	{from: "node/present/card", direct: true, forbid: []string{"attacher", "opi", "spdk", "node/remote", "node/present/pcie", "nvme"},
		why: "who asks a card for drives knows its contract, not how stores are reached nor what hosts do"},
	{from: "nbd", forbid: []string{"target", "node", "lvol", "qcow2"}, except: []string{"nbd/client"}, why: "the protocol and the kernel's client know no server and no device of ours"},
	{from: "target/nvmf", direct: true, forbid: []string{"lvol", "qcow2", "attacher"}, why: "front-ends see only interfaces of target/bdev"},
	{from: "target/nbd", direct: true, forbid: []string{"lvol", "qcow2", "attacher"}, why: "front-ends see only interfaces of target/bdev"},
	{from: "target/rpc", forbid: []string{"google.golang.org/grpc", "lvol", "qcow2", "node", "attacher", "nvme", "target/bdev", "target/nvmf", "target/nbd", "target/ublk"},
		why: "a dialect knows requests and answers, not what they do"},
	{from: "spdk", forbid: []string{"google.golang.org/grpc", "target", "lvol", "qcow2", "node", "attacher", "opi", "nvme", "image", "daemon"},
		why: "a client knows the methods, not who answers them nor what for"},
	{from: "opi", forbid: []string{"lvol", "qcow2", "target", "node", "attacher", "image", "nvme", "daemon"}, why: "the bridge knows SPDK by its methods only"},
	{from: "target", forbid: []string{"spdk", "opi"}, why: "who answers knows no client"},
	{from: "target/malloc", forbid: []string{"lvol", "qcow2", "node", "attacher", "nvme", "nbd"}, why: "a device knows nobody who uses it"},
	{from: "target/devnode", direct: true, forbid: []string{"lvol", "qcow2", "nvme", "attacher", "node"}, why: "it shows devices and knows no methods"},
	{from: "target", direct: true, forbid: []string{"google.golang.org/grpc", "github.com/containerd/containerd", "k8s.io", "qcow2", "node", "attacher", "image", "daemon", "operator"},
		why: "storage knows devices, not images or containers"},
	{from: "target/ublk", direct: true, forbid: []string{"lvol", "qcow2", "attacher"}, why: "front-ends see only interfaces of target/bdev"},
	{from: "node/cache", forbid: []string{"google.golang.org/grpc", "lvol", "qcow2", "attacher", "node/remote", "node/present", "image"},
		why: "the cache knows devices and who owns their bytes, not where they come from"},
	{from: "node/snapshotter", direct: true, forbid: []string{"lvol", "attacher", "target", "node/present/fuse", "image/convert"},
		why: "the snapshotter asks image-mgmt for disks and must not know the storage side"},
	{from: "node/remote", direct: true, forbid: []string{"lvol", "qcow2", "node/present", "node/imagemgmt", "node/snapshotter", "node/cache", "image", "daemon"},
		why: "who reads other machines' blocks must not know who shows them, or what is in them"},
	{from: "node/remote", forbid: []string{"lvol", "target/nvmf"}, why: "a node must not carry a store to reach one"},
	{from: "certificate", forbid: []string{"lvol", "target", "node", "daemon", "google.golang.org/grpc"}, why: "certificates know no protocol"},
	{from: "node/imagemgmt", forbid: []string{"github.com/containerd/containerd", "node/snapshotter", "image/convert"},
		why: "image-mgmt knows disks, not containers"},
	{from: "node/imagemgmt", direct: true, except: []string{"node/imagemgmt/server"}, forbid: []string{"attacher", "node/remote", "node/cache", "node/present/card", "node/present/pcie", "node/present/fuse", "lvol", "opi"},
		why: "image-mgmt is handed what reaches stores and cards, and knows none"},
	{from: "image", direct: true, forbid: []string{"lvol", "qcow2", "node/snapshotter", "node/imagemgmt", "node/present/fuse", "daemon"},
		why: "conversion speaks to the storage side through the attacher only"},
	{from: "image/convert/remote", direct: true, forbid: []string{"lvol", "nvme", "target", "node/imagemgmt", "node/remote", "attacher"},
		why: "a converter elsewhere knows contracts, and what shows disks by an interface"},
	{from: "node/present/transient", forbid: []string{"attacher", "api", "google.golang.org/grpc", "image", "node/remote"},
		why: "what shows an lvol for a while must not know who exported it"},
	{from: "attacher", direct: true, forbid: []string{"node/snapshotter", "node/imagemgmt", "image/convert", "daemon"},
		why: "the attacher knows blocks and exports, not nodes or images"},
	{from: "attacher/card", forbid: []string{"lvol", "qcow2", "target", "node", "image", "nvme", "nbd", "spdk", "opi", "daemon", "attacher/export", "attacher/backend"},
		why: "a card's attacher speaks OPI to its bridge, and carries neither a store nor a target"},
	{from: "attacher/hold", forbid: []string{"go.etcd.io/bbolt", "lvol", "qcow2", "target", "node", "image", "nvme", "nbd", "spdk", "opi", "daemon", "statedb"},
		why: "who keeps holds knows owners, not what is held or where that is on record"},
	{from: "attacher/backend/spdk", direct: true, forbid: []string{"spdk", "opi", "target/rpc", "target/nvmf", "attacher/export"},
		why: "the backend knows the bridge's contract, not the bridge or the target"},
	{from: "attacher/backend/rbd", direct: true, forbid: []string{"lvol/device", "qcow2", "node", "image", "nvme", "nbd", "spdk", "opi", "daemon", "target/nvmf", "attacher/export"},
		why: "a backend keeps lvols, and knows neither who shows them nor what is in them"},
	{from: "attacher/backend/backendtest", direct: true, forbid: []string{"attacher/backend", "attacher/export", "opi", "spdk", "target/nvmf"},
		why: "the suite knows no backend"},
	{from: "operator", forbid: []string{"lvol", "qcow2", "target", "node", "attacher", "image", "daemon"}, why: "the operator sees only api"},
	{from: "api", forbid: []string{"lvol", "qcow2", "target", "node", "attacher", "image", "daemon"}, why: "contracts know no implementation"},
	{from: "", except: []string{"cmd", "e2e", "bench"}, forbid: []string{"daemon"}, direct: true, why: "only commands and end-to-end tests see the whole"},
	{from: "", except: []string{"e2e", "bench"}, forbid: []string{"e2e", "bench"}, why: "test programs are no part of the product"},
	{from: "cmd", forbid: []string{"testing", "github.com/stretchr/testify"}, why: "test code does not belong in the binary"},
}

// below reports whether path is dir or lies below it.
func below(path, dir string) bool {
	if !strings.Contains(strings.SplitN(dir, "/", 2)[0], ".") && dir != "testing" {
		dir = strings.TrimSuffix(module+"/"+dir, "/")
	}
	return path == dir || strings.HasPrefix(path, dir+"/")
}

func anyBelow(path string, dirs []string) bool {
	for _, d := range dirs {
		if below(path, d) {
			return true
		}
	}
	return false
}

func TestImports(t *testing.T) {
	for _, p := range list(t) {
		for _, r := range rules {
			if !below(p.ImportPath, r.from) || anyBelow(p.ImportPath, r.except) || r.from == "" && p.ImportPath == module {
				continue
			}
			imports := p.Deps
			if r.direct {
				imports = p.Imports
			}
			for _, i := range imports {
				// A package may import its own kind: lvol/device imports lvol.
				if anyBelow(i, r.forbid) && !(r.from != "" && below(i, r.from)) {
					t.Errorf("%s imports %s: %s", strings.TrimPrefix(p.ImportPath, module+"/"), strings.TrimPrefix(i, module+"/"), r.why)
				}
			}
		}
	}
}

// TestRulesCanFail proves that a rule sees a forbidden import.
func TestRulesCanFail(t *testing.T) {
	if !anyBelow(module+"/lvol/device", []string{"lvol"}) || !anyBelow("google.golang.org/grpc/codes", []string{"google.golang.org/grpc"}) {
		t.Error("an import below a forbidden path is not seen")
	}
	if anyBelow(module+"/lvolume", []string{"lvol"}) || anyBelow("google.golang.org/grpcx", []string{"google.golang.org/grpc"}) {
		t.Error("an import beside a forbidden path is taken for one below")
	}
}

func TestPackages(t *testing.T) {
	forbidden := map[string]bool{"util": true, "utils": true, "common": true, "types": true, "helper": true, "helpers": true, "misc": true, "base": true}
	for _, p := range list(t) {
		if forbidden[p.Name] {
			t.Errorf("package %s: the name says nothing of what it is for", p.ImportPath)
		}
		if p.Doc == "" && len(p.GoFiles) > 0 && !generated(t, p) {
			t.Errorf("package %s has no package comment: say what it is for and what it must not know", p.ImportPath)
		}
	}
}

func generated(t *testing.T, p pkg) bool {
	for _, f := range p.GoFiles {
		file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, f), nil, parser.ParseComments|parser.PackageClauseOnly)
		if err != nil {
			t.Error(err)
			return true
		}
		if !ast.IsGenerated(file) {
			return false
		}
	}
	return true
}

const maxFileLines = 1200

func TestFiles(t *testing.T) {
	for _, p := range list(t) {
		files := append(append(append([]string{}, p.GoFiles...), p.TestGoFiles...), p.XTestGoFiles...)
		for _, name := range files {
			path := filepath.Join(p.Dir, name)
			set := token.NewFileSet()
			file, err := parser.ParseFile(set, path, nil, parser.ParseComments)
			if err != nil {
				t.Error(err)
				continue
			}
			if ast.IsGenerated(file) {
				continue
			}
			if n := countLines(t, path); n > maxFileLines {
				t.Errorf("%s has %d lines, more than %d", path, n, maxFileLines)
			}
			checkSkips(t, set, file)
		}
	}
}

func countLines(t *testing.T, path string) (n int) {
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		n++
	}
	return n
}

// checkSkips wants every skipped test to say why.
func checkSkips(t *testing.T, set *token.FileSet, file *ast.File) {
	ast.Inspect(file, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		if s, ok := call.Fun.(*ast.SelectorExpr); ok && (s.Sel.Name == "SkipNow" || s.Sel.Name == "Skip" && len(call.Args) == 0) {
			if x, ok := s.X.(*ast.Ident); ok && (x.Name == "t" || x.Name == "b" || x.Name == "f") {
				t.Errorf("%s: a test is skipped without saying why", set.Position(call.Pos()))
			}
		}
		return true
	})
}
