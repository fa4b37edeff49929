package target_test

import (
	"bytes"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/thaw-project/thaw/target"
)

// attach is the parameters of an attachment at 127.0.0.1.
func attach(name, port, more string) string {
	return fmt.Sprintf(`{"name":%q,"trtype":"TCP","adrfam":"IPv4","traddr":"127.0.0.1","trsvcid":%q,"subnqn":%q%s}`, name, port, nqn, more)
}

// TestAttach uses disks of one target on another: as bdevs, as base of an lvstore, as
// parent outside.
func TestAttach(t *testing.T) {
	far, near := start(t, target.Options{}), start(t, target.Options{})
	port := freePort(t)
	near.fails(-19, "bdev_nvme_attach_controller", attach("r", port, "")) // nobody listens
	far.call("bdev_malloc_create", `{"name":"m1","num_blocks":65536,"block_size":512}`)
	far.call("bdev_malloc_create", `{"name":"m2","num_blocks":4096,"block_size":4096}`)
	far.export(port, "m1")
	near.fails(-19, "bdev_nvme_attach_controller", strings.Replace(attach("r", port, ""), "disks", "nosuch", 1))
	near.fails(-22, "bdev_nvme_attach_controller", attach("r", port, `,"ctrlr_loss_timeout_sec":5,"reconnect_delay_sec":6`))
	near.fails(-32603, "bdev_nvme_attach_controller", attach("r", port, `,"colour":"red"`))
	near.fails(-126, "bdev_nvme_attach_controller", attach("r", port, `,"psk":"key0"`))
	if got := near.answer("bdev_nvme_attach_controller", attach("r", port, "")); got != `["rn1"]` {
		t.Errorf("attached: %s", got)
	}
	near.fails(-114, "bdev_nvme_attach_controller", attach("r", port, ""))
	near.fails(-114, "bdev_nvme_attach_controller", attach("r", port, `,"multipath":"disable"`))
	if a, b := near.uuidOf("rn1"), far.uuidOf("m1"); a != b {
		t.Errorf("uuid %s, the far one's is %s", a, b)
	}
	// Disks come and go.
	far.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":"m2","nsid":7}}`, nqn)
	near.call("bdev_get_bdevs", `{"name":"rn7","timeout":30000}`)
	near.call("bdev_lvol_create_lvstore", `{"bdev_name":"rn1","lvs_name":"lvs","cluster_sz":65536}`)
	near.call("bdev_lvol_clone_bdev", `{"bdev":"rn7","lvs_name":"lvs","clone_name":"c"}`)
	if k := near.kinds()["c"]; k != "esnap" {
		t.Errorf("c is %q", k)
	}
	local := freePort(t)
	near.export(local, "lvs/c")
	h := connect(t, local)
	c := near.open(h, "lvs/c")
	write(t, c, mib, bytes.Repeat([]byte{'c'}, mib))
	expect(t, c, 0, mib, 0)
	far.call("nvmf_subsystem_remove_ns", `{"nqn":%q,"nsid":7}`, nqn)
	eventually(t, "the clone is degraded", func() bool { return near.kinds()["c"] == "esnap degraded" })
	// Detached and attached, the lvstore is back, and with the parent the clone.
	near.call("bdev_nvme_detach_controller", `{"name":"r"}`)
	near.fails(-19, "bdev_nvme_detach_controller", `{"name":"r"}`)
	if got := near.answer("bdev_lvol_get_lvstores", ""); got != "[]" {
		t.Errorf("left: %s", got)
	}
	far.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":"m2","nsid":8}}`, nqn)
	if got := near.answer("bdev_nvme_attach_controller", attach("q", port, "")); got != `["qn1","qn8"]` {
		t.Errorf("attached: %s", got)
	}
	if k := near.kinds()["c"]; k != "esnap" {
		t.Errorf("c is %q", k)
	}
	near.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":"lvs/c","nsid":9}}`, nqn)
	eventually(t, "the host sees it", func() bool { _, err := h.Open(9); return err == nil })
	expect(t, near.open(h, "lvs/c"), mib, mib, 'c')
}

// TestAttachSelf attaches what the target exports itself: with SPDK the answer is no
// error and no bdev.
func TestAttachSelf(t *testing.T) {
	l := start(t, target.Options{})
	l.call("bdev_malloc_create", `{"name":"m","num_blocks":8192,"block_size":512}`)
	port := freePort(t)
	l.export(port, "m")
	if got := l.answer("bdev_nvme_attach_controller", attach("self", port, "")); got != `[]` {
		t.Errorf("attached: %s", got)
	}
	// With a UUID of its own it becomes one.
	l.call("bdev_malloc_create", `{"name":"n","num_blocks":8192,"block_size":512}`)
	l.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":"n","uuid":"11111111-2222-3333-4444-555555555555"}}`, nqn)
	l.call("bdev_get_bdevs", `{"name":"selfn2","timeout":30000}`)
}

// relay forwards connections and can be cut.
type relay struct {
	l    net.Listener
	mu   sync.Mutex
	all  map[net.Conn]bool // guarded by mu
	down bool              // guarded by mu
	wg   sync.WaitGroup
}

func newRelay(t *testing.T, port string) *relay {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{l: l, all: map[net.Conn]bool{}}
	r.wg.Go(func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", "127.0.0.1:"+port)
			r.mu.Lock()
			if err != nil || r.down {
				r.mu.Unlock()
				a.Close()
				if b != nil {
					b.Close()
				}
				continue
			}
			r.all[a], r.all[b] = true, true
			r.mu.Unlock()
			for _, p := range [][2]net.Conn{{a, b}, {b, a}} {
				r.wg.Go(func() {
					buf := make([]byte, 64<<10)
					for {
						n, err := p[0].Read(buf)
						if err == nil {
							_, err = p[1].Write(buf[:n])
						}
						if err != nil {
							p[0].Close()
							p[1].Close()
							return
						}
					}
				})
			}
		}
	})
	t.Cleanup(func() { l.Close(); r.cut(true); r.wg.Wait() })
	return r
}

func (r *relay) port() string {
	_, port, _ := net.SplitHostPort(r.l.Addr().String())
	return port
}

// cut ends all connections; down refuses new ones.
func (r *relay) cut(down bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.down = down
	for c := range r.all {
		c.Close()
	}
	clear(r.all)
}

// TestMultipath attaches over two portals, and cuts one and then the other under I/O.
func TestMultipath(t *testing.T) {
	far, near := start(t, target.Options{}), start(t, target.Options{})
	far.call("bdev_malloc_create", `{"name":"m","num_blocks":8192,"block_size":512}`)
	port := freePort(t)
	far.export(port, "m")
	a, b := newRelay(t, port), newRelay(t, port)
	more := `,"multipath":"multipath","ctrlr_loss_timeout_sec":60,"reconnect_delay_sec":1,"fast_io_fail_timeout_sec":30`
	near.call("bdev_nvme_attach_controller", attach("r", a.port(), more))
	near.fails(-22, "bdev_nvme_attach_controller", strings.Replace(attach("r", b.port(), more), "disks", "other", 1))
	near.fails(-22, "bdev_nvme_attach_controller", attach("r", b.port(), `,"multipath":"perhaps"`))
	if got := near.answer("bdev_nvme_attach_controller", attach("r", b.port(), more)); got != `["rn1"]` {
		t.Errorf("second path: %s", got)
	}
	states := func() (s []string) {
		var list []struct {
			Paths []struct {
				State string
				TRID  struct{ TRSvcID string }
			} `json:"ctrlrs"`
		}
		near.into(&list, "bdev_nvme_get_controllers", `{"name":"r"}`)
		for _, p := range list[0].Paths {
			s = append(s, p.State)
		}
		return s
	}
	local := freePort(t)
	near.call("nvmf_create_transport", `{"trtype":"TCP"}`)
	near.call("nvmf_create_subsystem", `{"nqn":%q,"allow_any_host":true}`, nqn)
	// The same UUID must not be shown twice to a host that knows both, but here nobody does.
	near.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":"rn1"}}`, nqn)
	near.listen(local)
	d := near.open(connect(t, local), "rn1")
	for i := range 4 {
		one := []*relay{a, b}[i%2]
		one.cut(true)
		for j := range 20 {
			write(t, d, int64(j)*4096, bytes.Repeat([]byte{byte(i)}, 4096))
		}
		expect(t, d, 0, 20*4096, byte(i))
		eventually(t, "the path is seen down", func() bool { return states()[i%2] == "reconnect_is_delayed" })
		one.cut(false)
		eventually(t, "both paths are up", func() bool { s := states(); return s[0] == "enabled" && s[1] == "enabled" })
	}
	near.call("bdev_nvme_detach_controller", `{"name":"r","trtype":"TCP","traddr":"127.0.0.1","trsvcid":%q}`, a.port())
	if s := states(); len(s) != 1 {
		t.Errorf("paths left: %v", s)
	}
	expect(t, d, 0, 20*4096, 3)
	near.fails(22, "bdev_nvme_get_controllers", `{"name":"nosuch"}`)
}

// TestLoss deletes a controller whose loss timeout is over.
func TestLoss(t *testing.T) {
	far, near := start(t, target.Options{}), start(t, target.Options{Persist: true})
	far.call("bdev_malloc_create", `{"name":"m","num_blocks":8192,"block_size":512}`)
	port := freePort(t)
	far.export(port, "m")
	a := newRelay(t, port)
	near.call("bdev_nvme_attach_controller", attach("r", a.port(), `,"ctrlr_loss_timeout_sec":1,"reconnect_delay_sec":1`))
	near.call("nvmf_create_subsystem", `{"nqn":%q,"allow_any_host":true}`, nqn)
	near.call("nvmf_subsystem_add_ns", `{"nqn":%q,"namespace":{"bdev_name":"rn1","nsid":5}}`, nqn)
	a.cut(true)
	eventually(t, "the bdev is gone", func() bool { return near.answer("bdev_get_bdevs", "") == "[]" })
	// It is on record, so it comes back, and what was made of it too.
	a.cut(false)
	eventually(t, "the nvmeNamespace is back", func() bool {
		return strings.Contains(near.answer("nvmf_get_subsystems", ""), `"nsid":5,"bdev_name":"rn1"`)
	})
}

// TestUnreachable takes away what is out of reach while I/O waits for it, for ever if
// need be.
func TestUnreachable(t *testing.T) {
	far := start(t, target.Options{})
	far.call("bdev_malloc_create", `{"name":"m","num_blocks":65536,"block_size":512}`)
	port := freePort(t)
	far.export(port, "m")
	for _, how := range []string{"detach", "close"} {
		t.Run(how, func(t *testing.T) {
			near := start(t, target.Options{})
			a := newRelay(t, port)
			near.call("bdev_nvme_attach_controller", attach("r", a.port(), `,"ctrlr_loss_timeout_sec":-1,"reconnect_delay_sec":1`))
			near.call("bdev_lvol_create_lvstore", `{"bdev_name":"rn1","lvs_name":"lvs","cluster_sz":65536}`)
			near.call("bdev_lvol_create", `{"lvol_name":"a","size_in_mib":4,"thin_provision":true,"lvs_name":"lvs"}`)
			local := freePort(t)
			near.export(local, "lvs/a")
			d := near.open(connect(t, local), "lvs/a")
			write(t, d, 0, []byte("x"))
			a.cut(true)
			var wg sync.WaitGroup
			for i := range 8 {
				wg.Go(func() { d.WriteAt(make([]byte, 4096), int64(i+1)*65536) }) // fails in the end, or when the host closes
			}
			eventually(t, "the path is seen down", func() bool {
				return strings.Contains(near.answer("bdev_nvme_get_controllers", ""), "reconnect_is_delayed")
			})
			if how == "detach" {
				near.call("bdev_nvme_detach_controller", `{"name":"r"}`)
				if got := near.answer("bdev_get_bdevs", ""); got != "[]" {
					t.Errorf("left: %s", got)
				}
			} else if err := near.target.Close(); err == nil {
				t.Log("closed without a complaint") // the lvstore could not be made durable, which is logged
			}
		})
	}
}
