package ceph

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/thaw-project/thaw/e2e/lab"
)

// Programs are what a cluster needs in the path.
var Programs = []string{"ceph-mon", "ceph-mgr", "ceph-osd", "ceph", "rbd", "monmaptool", "ceph-authtool"}

const (
	// startTimeout bounds each wait for a daemon: on a busy machine with two cores the
	// first start takes up to half a minute.
	startTimeout = 3 * time.Minute

	// deviceBytes is the size of the OSD's sparse file.
	deviceBytes = 16 << 30

	// osdMemoryBytes is what BlueStore may cache, the least that it takes.
	osdMemoryBytes = 1 << 30
)

// Missing names the programs of Programs that are not installed.
func Missing() []string {
	var missing []string
	for _, p := range Programs {
		if _, err := exec.LookPath(p); err != nil {
			missing = append(missing, p)
		}
	}
	return missing
}

// Options says what cluster Start makes.
type Options struct {
	// Pools are made with 8 placement groups and for RBD.
	Pools []string
	// Auth asks for cephx; without it everybody may do everything.
	Auth bool
}

// Cluster is a running cluster. Its methods may be called by one goroutine at a time.
type Cluster struct {
	FSID   string
	Config string // path of ceph.conf, which names everything else

	lab  *lab.Lab
	dir  string
	runs int
	mon  *lab.Process
	osd  *lab.Process
}

// Start starts a cluster in l's folder and returns when its pools take I/O. l's Close
// ends it.
func Start(ctx context.Context, l *lab.Lab, o Options) (*Cluster, error) {
	if missing := Missing(); len(missing) > 0 {
		return nil, fmt.Errorf("not installed: %s; run tools/install-deps ceph", strings.Join(missing, ", "))
	}
	conf, err := l.Path("ceph", "ceph.conf")
	if err != nil {
		return nil, err
	}
	c := &Cluster{FSID: uuid.NewString(), Config: conf, lab: l, dir: filepath.Dir(conf)}
	if err := c.start(ctx, o); err != nil {
		return nil, fmt.Errorf("start a Ceph cluster: %w", err)
	}
	return c, nil
}

func (c *Cluster) start(ctx context.Context, o Options) error {
	address, err := c.configure(o)
	if err != nil {
		return err
	}
	mkfs := []string{"ceph-mon", "--mkfs", "-i", "a", "--monmap", filepath.Join(c.dir, "monmap"), "-c", c.Config}
	if o.Auth {
		mkfs = append(mkfs, "--keyring", c.keyring())
	}
	if err := c.run(ctx, "monmaptool", "--create", "--addv", "a", address, "--fsid", c.FSID, filepath.Join(c.dir, "monmap")); err != nil {
		return err
	}
	if err := c.run(ctx, mkfs[0], mkfs[1:]...); err != nil {
		return err
	}
	if c.mon, err = c.daemon("ceph-mon", "a"); err != nil {
		return err
	}
	osd := uuid.NewString()
	if err := c.until(ctx, c.mon, func() error {
		_, err := c.Ceph(ctx, "osd", "new", osd, "0")
		return err
	}); err != nil {
		return err
	}
	if o.Auth {
		key := filepath.Join(c.dir, "osd", "keyring")
		out, err := c.Ceph(ctx, "auth", "get-or-create", "osd.0", "mon", "allow profile osd", "osd", "allow *")
		if err == nil {
			err = os.WriteFile(key, out, 0o600)
		}
		if err != nil {
			return err
		}
	}
	if err := c.startManager(ctx, o); err != nil {
		return err
	}
	if err := c.run(ctx, "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd, "-c", c.Config); err != nil {
		return err
	}
	if err := c.StartOSD(ctx); err != nil {
		return err
	}
	for _, pool := range o.Pools {
		if _, err := c.Ceph(ctx, "osd", "pool", "create", pool, "8", "8", "replicated"); err != nil {
			return err
		}
		if _, err := c.Ceph(ctx, "osd", "pool", "application", "enable", pool, "rbd"); err != nil {
			return err
		}
		// The first write shows that the placement groups are active.
		if err := c.until(ctx, c.osd, func() error {
			return c.run(ctx, "rbd", "-c", c.Config, "pool", "init", pool)
		}); err != nil {
			return err
		}
	}
	// Until the manager has heard of the OSD, there is no free space.
	return c.until(ctx, c.osd, func() error {
		out, err := c.Ceph(ctx, "df", "-f", "json")
		if err != nil {
			return err
		}
		var df struct {
			Pools []struct {
				Stats struct {
					MaxAvail int64 `json:"max_avail"`
				} `json:"stats"`
			} `json:"pools"`
		}
		if err := json.Unmarshal(out, &df); err != nil {
			return err
		}
		if len(df.Pools) < len(o.Pools) {
			return fmt.Errorf("the manager knows %d pools of %d", len(df.Pools), len(o.Pools))
		}
		for _, p := range df.Pools {
			if p.Stats.MaxAvail <= 0 {
				return errors.New("the manager knows of no free space")
			}
		}
		return nil
	})
}

// startManager starts what counts the pools' space. It loads no modules but those that it
// cannot do without.
func (c *Cluster) startManager(ctx context.Context, o Options) error {
	if o.Auth {
		out, err := c.Ceph(ctx, "auth", "get-or-create", "mgr.x", "mon", "allow profile mgr", "osd", "allow *")
		if err == nil {
			err = os.WriteFile(filepath.Join(c.dir, "mgr", "keyring"), out, 0o600)
		}
		if err != nil {
			return err
		}
	}
	_, err := c.daemon("ceph-mgr", "x")
	return err
}

// configure writes what the daemons read and returns the monitor's addresses.
func (c *Cluster) configure(o Options) (string, error) {
	for _, d := range []string{"mon", "mgr", "osd"} {
		if err := os.Mkdir(filepath.Join(c.dir, d), 0o700); err != nil {
			return "", err
		}
	}
	ports, err := freePorts(2)
	if err != nil {
		return "", err
	}
	address := fmt.Sprintf("[v2:127.0.0.1:%d,v1:127.0.0.1:%d]", ports[0], ports[1])
	auth := "none"
	if o.Auth {
		auth = "cephx"
	}
	text := fmt.Sprintf(`[global]
fsid = %[1]s
mon initial members = a
mon host = %[2]s
public network = 127.0.0.0/8
auth cluster required = %[3]s
auth service required = %[3]s
auth client required = %[3]s
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
mon warn on pool no redundancy = false
osd crush chooseleaf type = 0
keyring = %[4]s/keyring
run dir = %[4]s
pid file = %[4]s/$name.pid
admin socket = %[4]s/$name.$pid.asok
log file = %[4]s/$name.log
# A client that nobody hears of for so long has lost its watches.
osd client watch timeout = 15
# An OSD that says goodbye is down at once; one that was killed is reported by its peers,
# and with no peers the monitor notices that the new one has another address.
osd heartbeat grace = 5
[mon]
mon data = %[4]s/mon
mon cluster log file = %[4]s/cluster.log
[mgr]
mgr data = %[4]s/mgr
keyring = %[4]s/mgr/keyring
mgr initial modules =
[osd]
osd data = %[4]s/osd
keyring = %[4]s/osd/keyring
osd objectstore = bluestore
bluestore block create = true
bluestore block size = %[5]d
bluestore block db create = false
bluestore block wal create = false
osd memory target = %[6]d
`, c.FSID, address, auth, c.dir, int64(deviceBytes), int64(osdMemoryBytes))
	if err := os.WriteFile(c.Config, []byte(text), 0o600); err != nil {
		return "", err
	}
	ring := ""
	if o.Auth {
		key, err := newKey()
		if err != nil {
			return "", err
		}
		caps := "\tcaps mon = \"allow *\"\n\tcaps osd = \"allow *\"\n\tcaps mgr = \"allow *\"\n"
		ring = "[mon.]\n\tkey = " + key + "\n\tcaps mon = \"allow *\"\n[client.admin]\n\tkey = " + key + "\n" + caps
	}
	return address, os.WriteFile(c.keyring(), []byte(ring), 0o600)
}

func (c *Cluster) keyring() string { return filepath.Join(c.dir, "keyring") }

// newKey makes a cephx secret: type 1 (AES), the time, a length and 16 bytes.
func newKey() (string, error) {
	raw := make([]byte, 12+16)
	binary.LittleEndian.PutUint16(raw, 1)
	binary.LittleEndian.PutUint32(raw[2:], uint32(time.Now().Unix()))
	binary.LittleEndian.PutUint16(raw[10:], 16)
	if _, err := rand.Read(raw[12:]); err != nil {
		return "", err
	}
	return base64.StdEncoding.EncodeToString(raw), nil
}

func freePorts(n int) ([]int, error) {
	var ports []int
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

// User makes a cephx user with these capabilities at OSDs, as "profile rbd pool=x";
// ceph.conf names its keyring from then on.
func (c *Cluster) User(ctx context.Context, name, capabilities string) error {
	out, err := c.Ceph(ctx, "auth", "get-or-create", "client."+name, "mon", "profile rbd", "osd", capabilities)
	if err != nil {
		return err
	}
	path := filepath.Join(c.dir, "client."+name+".keyring")
	if err := os.WriteFile(path, out, 0o600); err != nil {
		return err
	}
	conf, err := os.OpenFile(c.Config, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(conf, "[client.%s]\nkeyring = %s\n", name, path)
	return errors.Join(err, conf.Close())
}

// Ceph runs the command line's ceph and returns what it prints.
func (c *Cluster) Ceph(ctx context.Context, args ...string) ([]byte, error) {
	return c.output(ctx, "ceph", append([]string{"-c", c.Config, "--connect-timeout", "10"}, args...)...)
}

// RBD runs the command line's rbd and returns what it prints.
func (c *Cluster) RBD(ctx context.Context, args ...string) ([]byte, error) {
	return c.output(ctx, "rbd", append([]string{"-c", c.Config}, args...)...)
}

func (c *Cluster) run(ctx context.Context, name string, args ...string) error {
	_, err := c.output(ctx, name, args...)
	return err
}

func (c *Cluster) output(ctx context.Context, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	command := c.lab.Command(ctx, name, args...)
	var stderr bytes.Buffer
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w: %.400s", name, strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}

// daemon starts a daemon in the foreground.
func (c *Cluster) daemon(program, id string) (*lab.Process, error) {
	c.runs++
	return c.lab.Start(lab.Spec{
		Name: fmt.Sprintf("%s.%d", program, c.runs),
		Args: []string{program, "-f", "-i", id, "-c", c.Config},
	})
}

// until tries again while p runs.
func (c *Cluster) until(ctx context.Context, p *lab.Process, try func() error) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		err := try()
		if err == nil {
			return nil
		}
		if !p.Running() {
			return fmt.Errorf("%w; the daemon ended, its log:\n%s", err, p.Log(4096))
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		}
	}
}

// StartOSD starts the OSD and waits until the monitor takes it for up.
func (c *Cluster) StartOSD(ctx context.Context) error {
	before, err := c.epoch(ctx)
	if err != nil {
		return err
	}
	if c.osd, err = c.daemon("ceph-osd", "0"); err != nil {
		return err
	}
	return c.until(ctx, c.osd, func() error {
		s, err := c.osdState(ctx)
		switch {
		case err != nil:
			return err
		case !s.up || s.upFrom <= before:
			return fmt.Errorf("the OSD is not up: %+v", s)
		}
		return nil
	})
}

type osdState struct {
	up     bool
	upFrom int
}

func (c *Cluster) dump(ctx context.Context) (epoch int, s osdState, err error) {
	out, err := c.Ceph(ctx, "osd", "dump", "-f", "json")
	if err != nil {
		return 0, s, err
	}
	var d struct {
		Epoch int `json:"epoch"`
		OSDs  []struct {
			Up     int `json:"up"`
			UpFrom int `json:"up_from"`
		} `json:"osds"`
	}
	if err := json.Unmarshal(out, &d); err != nil {
		return 0, s, err
	}
	if len(d.OSDs) > 0 {
		s = osdState{up: d.OSDs[0].Up == 1, upFrom: d.OSDs[0].UpFrom}
	}
	return d.Epoch, s, nil
}

func (c *Cluster) epoch(ctx context.Context) (int, error) {
	epoch, _, err := c.dump(ctx)
	return epoch, err
}

func (c *Cluster) osdState(ctx context.Context) (osdState, error) {
	_, s, err := c.dump(ctx)
	return s, err
}

// KillOSD kills the OSD; what it acknowledged survives.
func (c *Cluster) KillOSD() { c.osd.Kill() }

// StopOSD ends the OSD as an upgrade does.
func (c *Cluster) StopOSD() error { return c.osd.Stop() }

// RestartOSD stops the OSD and starts it again.
func (c *Cluster) RestartOSD(ctx context.Context) error {
	if err := c.StopOSD(); err != nil {
		return err
	}
	return c.StartOSD(ctx)
}
