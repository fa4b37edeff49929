package daemon

import (
	"bytes"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/thaw-project/thaw/kind"
)

func load(t *testing.T, text string) (Config, error) {
	t.Helper()
	return loadAs(t, text, ProcessServer)
}

func loadAs(t *testing.T, text string, p Process) (Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := LoadConfig(path)
	if err == nil {
		err = c.As(p)
	}
	if err == nil {
		err = c.Validate()
	}
	return c, err
}

func TestConfigOverDefaults(t *testing.T) {
	c, err := load(t, `
root = "/srv/thaw"
log_level = "DEBUG"
[pool]
capacity = "200GiB"
[snapshotter]
attach_timeout = "3s"
`)
	if err != nil {
		t.Fatal(err)
	}
	if c.Root != "/srv/thaw" || c.Run != DefaultRun || c.Pool.Capacity != 200<<30 || c.Pool.Cluster != 64<<10 ||
		time.Duration(c.Snapshotter.AttachTimeout) != 3*time.Second || c.LogLevel.String() != "DEBUG" {
		t.Fatalf("%+v", c)
	}
}

const remoteTable = "[[remote]]\nname = \"rack\"\nattacher = \"x:1\"\ncertificate = \"c\"\nkey = \"k\"\nca = \"a\"\n"

func TestRoles(t *testing.T) {
	c, err := load(t, "roles = [\"node\"]\n"+remoteTable)
	if err != nil {
		t.Fatal(err)
	}
	if r := c.Remote[0]; c.Store() || !c.Images() || r.Transport != "nvme-tcp" || time.Duration(r.LossTimeout) != 10*time.Minute || !filepath.IsAbs(r.Key) {
		t.Fatalf("%+v", c)
	}
	c, err = load(t, "[export]\nnvme_tcp = [\"10.0.0.1:4420\", \"[fd00::1]:4420\"]\nattacher = \"10.0.0.1:7443\"\ncertificate = \"c\"\nkey = \"k\"\nclient_ca = \"a\"\n"+remoteTable)
	if err != nil || !c.Store() || !c.Images() || !c.Exports() {
		t.Fatalf("%+v, %v", c, err)
	}
}

const spdkPool = "pool.backend = \"spdk\"\n[pool.spdk]\nbridge = \"/run/b.sock\"\nlvstore = \"thaw\"\n"

func TestConfigRefuses(t *testing.T) {
	for name, tc := range map[string]struct{ text, says string }{
		"unknown key":     {"rot = \"/x\"", "rot"},
		"unknown table":   {"[poool]\ncapacity = \"1GiB\"", "poool"},
		"not TOML":        {"root = ", "line 1"},
		"bad size":        {"[pool]\ncapacity = \"many\"", "20GiB"},
		"negative size":   {"[pool]\ncapacity = \"-5\"", "20GiB"},
		"bad duration":    {"[snapshotter]\nattach_timeout = \"soon\"", "10s"},
		"no unit":         {"[snapshotter]\nattach_timeout = 10", "as \"10s\""},
		"no list":         {"roles = \"store\"", "list of strings"},
		"bad level":       {"log_level = \"loud\"", "must be DEBUG, INFO, WARN or ERROR"},
		"function twice":  {"roles = [\"store\", \"card\"]\n[card]\nbridge = \"/b\"\nhost = \"h\"\nfunctions = [\"0:1:0\", \"0:1:0\"]", "twice"},
		"tiny pool":       {"[pool]\ncapacity = \"1KiB\"", "4 clusters"},
		"two keys":        {"rot = 1\n[pool]\nsize = 2", "pool.size"},
		"bad cluster":     {"[pool]\ncluster = \"100KiB\"", "power of two"},
		"bad io":          {"[pool]\nio = \"magic\"", "uring"},
		"bad target":      {"target = \"a b\"", "target"},
		"long run":        {"run = \"/" + strings.Repeat("x", 120) + "\"", "107"},
		"device and size": {"[pool]\ndevice = \"/dev/sdx\"\ncapacity = \"1GiB\"", "pool.device"},
		"no role":         {"roles = []", "roles"},
		"bad role":        {"roles = [\"king\"]", "king"},
		"node of nothing": {"roles = [\"node\"]", "[[remote]]"},
		"open export":     {"[export]\nnvme_tcp = [\"10.0.0.1:4420\"]\nattacher = \"10.0.0.1:7443\"", "export.certificate"},
		"half an export":  {"[export]\nnvme_tcp = [\"10.0.0.1:4420\"]", "attacher"},
		"bad portal":      {"[export]\nnvme_tcp = [\"store:4420\"]\nattacher = \"10.0.0.1:7443\"\ncertificate = \"c\"\nkey = \"k\"\nclient_ca = \"a\"", "IP address"},
		"export of node":  {"roles = [\"node\"]\n[export]\nattacher = \"x:1\"", "role store"},
		"remote of store": {"roles = [\"store\"]\n" + remoteTable, "role node"},
		"own name":        {"target = \"rack\"\n" + remoteTable, "another target"},
		"name twice":      {remoteTable + remoteTable, "another target"},
		"open remote":     {"[[remote]]\nname = \"rack\"\nattacher = \"x:1\"", "certificate"},
		"bad transport":   {remoteTable + "transport = \"pigeon\"", "nvme-tcp"},
		"bad attacher":    {strings.Replace(remoteTable, "x:1", "x", 1), "port"},
		"tiny cache":      {"[cache]\nsize = \"1KiB\"", "cache"},
		"no backend":      {"[pool]\nbackend = \"tape\"", "embedded, spdk or rbd"},
		"spdk of nobody":  {"[pool]\nbackend = \"spdk\"", "pool.spdk.bridge"},
		"spdk and file":   {"pool.capacity = \"1GiB\"\n" + spdkPool, "embedded"},
		"spdk far away":   {strings.Replace(spdkPool, "/run/b.sock", "10.0.0.1:9605", 1), "certificate"},
		"spdk portal":     {spdkPool + "portals = [\"10.0.0.1:4420\"]", "tcp://10.0.0.1:4420"},
		"spdk and export": {"[export]\nnvme_tcp = [\"10.0.0.1:4420\"]\nattacher = \"10.0.0.1:7443\"\ncertificate = \"c\"\nkey = \"k\"\nclient_ca = \"a\"\n[pool]\nbackend = \"spdk\"\n[pool.spdk]\nbridge = \"/b\"\nlvstore = \"l\"", "pool.spdk.portals"},
		"rbd of nobody":   {"[pool]\nbackend = \"rbd\"", "pool.rbd.pool"},
		"converter":       {"[export]\nnvme_tcp = [\"10.0.0.1:4420\"]\nattacher = \"10.0.0.1:7443\"\ncertificate = \"c\"\nkey = \"k\"\nclient_ca = \"a\"\nconverters = [\"a b\"]", "export.converters"},
		"card of nobody":  {"roles = [\"card\"]", "card.bridge"},
		"card of no host": {"roles = [\"card\"]\n[card]\nbridge = \"/b\"\nfunctions = [\"0:1:0\"]", "card.host"},
		"no function":     {"roles = [\"card\"]\n[card]\nbridge = \"/b\"\nhost = \"h\"", "card.functions"},
		"bad function":    {"roles = [\"card\"]\n[card]\nbridge = \"/b\"\nhost = \"h\"\nfunctions = [\"one\"]", "card.functions"},
		"bad mode":        {"[images]\nmode = \"moon\"", "dpu"},
		"card and host":   {"roles = [\"node\"]\n[images]\nmode = \"dpu\"\n" + remoteTable, "role snapshots"},
		"images for all":  {"[images.listen]\naddress = \"10.0.0.1:7444\"\ncertificate = \"c\"\nkey = \"k\"\nclient_ca = \"a\"", "images.listen.clients"},
		"images of hosts": {"[images.listen]\naddress = \"10.0.0.1:7444\"\ncertificate = \"c\"\nkey = \"k\"\nclient_ca = \"a\"\nclients = [\"h\"]", "images.mode dpu"},
		"images unproven": {"[images.listen]\naddress = \"10.0.0.1:7444\"\nclients = [\"h\"]", "images.listen.certificate"},
		"far images":      {"[snapshotter.images]\naddress = \"10.0.0.1:7444\"", "certificate"},
		"bad PCI address": {"[pcie.functions]\n\"0:1:0\" = \"slot 3\"", "slot 3"},
		"far store":       {"[convert.attacher]\naddress = \"10.0.0.1:7443\"", "certificate"},
		"rbd elsewhere":   {remoteTable + "transport = \"rbd\"", "rbd.pool"},
		"level":           {"log_level = \"loud\"", "log_level"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := load(t, tc.text)
			if err == nil || kind.Of(err) != kind.Invalid || !strings.Contains(err.Error(), tc.says) {
				t.Fatalf("got %v (kind %q), want kind invalid and %q", err, kind.Of(err), tc.says)
			}
		})
	}
}

func TestPrintedConfigReadsBack(t *testing.T) {
	want := DefaultConfig()
	want.Pool.Capacity = 3 << 30
	var text bytes.Buffer
	if err := PrintConfig(&text, want); err != nil {
		t.Fatal(err)
	}
	got, err := load(t, text.String())
	if err != nil {
		t.Fatalf("%v in\n%s", err, text.String())
	}
	var again bytes.Buffer
	if err := PrintConfig(&again, got); err != nil {
		t.Fatal(err)
	}
	if again.String() != text.String() {
		t.Fatalf("got\n%s\nwant\n%s", again.String(), text.String())
	}
}

func TestMissingConfigFileIsAnErrorOnlyWhenNamed(t *testing.T) {
	if _, err := LoadConfig(filepath.Join(t.TempDir(), "none.toml")); kind.Of(err) != kind.NotFound {
		t.Fatalf("got %v", err)
	}
}

func TestSecondServerIsToldWhoHoldsTheLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "root", "lock")
	first, err := lock(path, "root", false)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	_, err = lock(path, "root", false)
	if kind.Of(err) != kind.InUse || !strings.Contains(err.Error(), "--root") {
		t.Fatalf("got %v", err)
	}
}

func TestSocketsAreForRootAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	for range 2 { // the second finds the first one's file
		l, err := listenUnix(path)
		if err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(path)
		if err != nil || st.Mode().Perm() != 0o600 {
			t.Fatalf("mode %v, %v", st.Mode(), err)
		}
		if _, err := listenUnix(path); kind.Of(err) != kind.InUse || !strings.Contains(err.Error(), path) {
			t.Fatalf("a socket on which somebody answers: %v", err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false) // as a killed server
		l.Close()
	}
}

func TestOnlySocketsAreReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listenUnix(path); kind.Of(err) != kind.InUse {
		t.Fatalf("got %v", err)
	}
	if raw, err := os.ReadFile(path); err != nil || string(raw) != "precious" {
		t.Fatalf("%q, %v", raw, err)
	}
}

// TestProcessLocks takes the locks of processes beside each other, and of a server.
func TestProcessLocks(t *testing.T) {
	dir := t.TempDir()
	of := func(p Process) *Server {
		c := DefaultConfig()
		c.Root, c.Run = filepath.Join(dir, "root"), filepath.Join(dir, "run")
		if err := c.As(p); err != nil {
			t.Fatal(err)
		}
		return &Server{config: c, logger: slog.New(slog.DiscardHandler)}
	}
	var held []*Server
	for _, p := range []Process{ProcessAttacher, ProcessImages, ProcessSnapshots} {
		s := of(p)
		if err := s.lock(); err != nil {
			t.Fatalf("%s beside others: %v", p, err)
		}
		held = append(held, s)
		again := of(p)
		if err := again.lock(); kind.Of(err) != kind.InUse {
			t.Errorf("a second %s: %v", p, err)
		}
		if err := again.close(); err != nil {
			t.Error(err)
		}
	}
	server := of(ProcessServer)
	if err := server.lock(); kind.Of(err) != kind.InUse || !strings.Contains(err.Error(), dir) {
		t.Errorf("a server beside processes: %v", err)
	}
	for _, s := range held {
		if err := s.close(); err != nil {
			t.Error(err)
		}
	}
	if err := server.lock(); err != nil {
		t.Errorf("a server after processes: %v", err)
	}
	late := of(ProcessImages)
	if err := late.lock(); kind.Of(err) != kind.InUse {
		t.Errorf("a process beside a server: %v", err)
	}
	if err := late.close(); err != nil {
		t.Error(err)
	}
	if err := server.close(); err != nil {
		t.Error(err)
	}
}
