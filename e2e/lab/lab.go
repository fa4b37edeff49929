// Package lab runs the real programs that Thaw works with (a registry, containerd,
// thaw server) in folders of their own, and takes away everything they leave.
//
// All a lab starts, mounts or creates is recognisable: processes carry the lab's
// folder in their environment or their cgroup, mounts and loop devices lie under it,
// and the names of network devices come from the pid of the lab's owner. So Close
// can clean up after programs that were killed, Sweep after labs whose own process
// was, and Leftovers can say what a program left that it should not have.
//
// The package is for tests, benchmarks and the demo; nothing of the product may
// import it.
package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// dirPrefix begins the name of every lab's folder: thaw-e2e.<pid>.<number>. It is
// short because sockets lie below and their paths are limited to 107 bytes.
const dirPrefix = "thaw-e2e."

// envMark is in the environment of every process a lab starts, so that those that
// outlive their parent are found.
const envMark = "THAW_LAB="

// cgroupRoot is the parent cgroup of every container that a lab starts.
const cgroupRoot = "/thaw-e2e"

// Lab is one set of programs and their folder. Methods may be called concurrently.
type Lab struct {
	Dir  string // everything is below
	Bin  string // where containerd, its shim and thaw are
	name string

	mu        sync.Mutex
	processes []*Process // guarded by mu; in order of start
	networks  []*Link    // guarded by mu
	closed    bool       // guarded by mu
}

var labNumber atomic.Int64

// New makes a lab with an empty folder. It first sweeps labs whose owner is dead.
func New() (*Lab, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("not root: run as root, since containers, mounts and network namespaces need it")
	}
	bin, err := BinDir()
	if err != nil {
		return nil, err
	}
	if err := Sweep(); err != nil {
		return nil, fmt.Errorf("sweep what an earlier run left: %w", err)
	}
	name := fmt.Sprintf("%s%d.%d", dirPrefix, os.Getpid(), labNumber.Add(1))
	dir := filepath.Join(os.TempDir(), name)
	start, err := processStart(os.Getpid())
	if err != nil {
		return nil, err
	}
	// It gets its name when it has an owner: another lab's sweep takes one without for
	// that of a dead one.
	fresh, err := os.MkdirTemp("", "new-"+dirPrefix)
	if err != nil {
		return nil, err
	}
	owner := fmt.Sprintf("%d %s\n", os.Getpid(), start)
	err = errors.Join(os.WriteFile(filepath.Join(fresh, "owner"), []byte(owner), 0o600), os.Mkdir(filepath.Join(fresh, "log"), 0o700))
	if err == nil {
		err = os.Rename(fresh, dir)
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(fresh))
	}
	return &Lab{Dir: dir, Bin: bin, name: name}, nil
}

// BinDir returns the folder of the programs that "make tools build" builds: that of
// $THAW_BIN, else bin/ beside the module's go.mod.
func BinDir() (string, error) {
	if dir := os.Getenv("THAW_BIN"); dir != "" {
		return filepath.Abs(dir)
	}
	root, err := ModuleRoot()
	if err != nil {
		return "", err
	}
	return filepath.Join(root, "bin"), nil
}

// ModuleRoot returns the folder of the module's go.mod, found upward from the
// working folder.
func ModuleRoot() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; ; dir = filepath.Dir(dir) {
		data, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(data), "module github.com/thaw-project/thaw\n") {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("no go.mod of Thaw above the working folder: run inside the checkout")
		}
	}
}

// Cgroup returns the cgroup path for a container of this lab.
func (l *Lab) Cgroup(id string) string {
	return filepath.Join(cgroupRoot, l.name, id)
}

// Path returns a path below the lab's folder, whose parents it makes.
func (l *Lab) Path(elem ...string) (string, error) {
	path := filepath.Join(append([]string{l.Dir}, elem...)...)
	return path, os.MkdirAll(filepath.Dir(path), 0o700)
}

// Close stops every process in reverse order of start and removes all that is left.
func (l *Lab) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	processes, networks := l.processes, l.networks
	l.mu.Unlock()

	var errs []error
	killAll(containerProcesses(l.name))
	for i := len(processes) - 1; i >= 0; i-- {
		if err := processes[i].Stop(); err != nil {
			errs = append(errs, err)
		}
	}
	for _, n := range networks {
		errs = append(errs, n.remove())
	}
	errs = append(errs, clean(l.Dir))
	return errors.Join(errs...)
}

// LeftoversBelow returns a line for each mount and loop device that lies below dir, a
// folder of the lab, and each process that names dir in its command line: what killed
// or ended programs have left behind.
func (l *Lab) LeftoversBelow(dir string) ([]string, error) {
	var lines []string
	mounts, err := mountsBelow(dir)
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		lines = append(lines, "mount "+m)
	}
	loops, err := loopsBelow(dir)
	if err != nil {
		return nil, err
	}
	for device, file := range loops {
		lines = append(lines, "loop "+device+" on "+file)
	}
	for _, pid := range markedProcesses(l.Dir) {
		if line := commandLine(pid); strings.Contains(line, dir+"/") {
			lines = append(lines, fmt.Sprintf("process %d %s", pid, line))
		}
	}
	return lines, nil
}

// Sweep removes what labs whose owning process is dead have left.
func Sweep() error {
	dirs, err := filepath.Glob(filepath.Join(os.TempDir(), dirPrefix+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, dir := range dirs {
		if ownerAlive(dir) {
			continue
		}
		killAll(containerProcesses(filepath.Base(dir)))
		errs = append(errs, clean(dir))
	}
	errs = append(errs, sweepLinks())
	return errors.Join(errs...)
}

func ownerAlive(dir string) bool {
	data, err := os.ReadFile(filepath.Join(dir, "owner"))
	if err != nil {
		// No owner yet: New makes the folder and writes the file at once.
		info, err := os.Stat(dir)
		return err == nil && time.Since(info.ModTime()) < time.Minute
	}
	pidText, start, _ := strings.Cut(strings.TrimSpace(string(data)), " ")
	pid, err := strconv.Atoi(pidText)
	if err != nil {
		return false
	}
	now, err := processStart(pid)
	return err == nil && now == start
}

// clean kills what carries dir's mark, unmounts and detaches what lies below dir, and
// removes dir.
func clean(dir string) error {
	killAll(markedProcesses(dir))
	var errs []error
	// A file system on a loop on a file of a FUSE mount comes away layer by layer;
	// four rounds are one more than any stack Thaw makes.
	for range 4 {
		// Looked for first: once a mount is detached, the kernel names the files on it
		// by paths that say nothing.
		loops, err := loopsBelow(dir)
		if err != nil {
			return err
		}
		mounts, err := mountsBelow(dir)
		if err != nil {
			return err
		}
		for i := len(mounts) - 1; i >= 0; i-- {
			_ = unix.Unmount(mounts[i], unix.MNT_DETACH)
		}
		for device := range loops {
			_ = detachLoop(device)
		}
		if len(mounts) == 0 && len(loops) == 0 {
			break
		}
	}
	if mounts, _ := mountsBelow(dir); len(mounts) > 0 {
		return fmt.Errorf("still mounted below %s: %s", dir, strings.Join(mounts, " "))
	}
	removeCgroups(filepath.Base(dir))
	errs = append(errs, removeAll(dir))
	return errors.Join(errs...)
}

// removeAll is os.RemoveAll, with a second try for a folder that a dying process
// wrote into meanwhile.
func removeAll(dir string) error {
	err := os.RemoveAll(dir)
	if err != nil {
		time.Sleep(200 * time.Millisecond)
		err = os.RemoveAll(dir)
	}
	return err
}

func mountsBelow(dir string) ([]string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var paths []string
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		path := unescapeMount(fields[4])
		if strings.HasPrefix(path, dir+"/") {
			paths = append(paths, path)
		}
	}
	return paths, nil
}

// unescapeMount undoes the kernel's octal escapes in mountinfo.
func unescapeMount(s string) string {
	for _, e := range []struct{ octal, char string }{{`\040`, " "}, {`\011`, "\t"}, {`\012`, "\n"}, {`\134`, `\`}} {
		s = strings.ReplaceAll(s, e.octal, e.char)
	}
	return s
}

func loopsBelow(dir string) (map[string]string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	loops := map[string]string{}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			continue // detached meanwhile
		}
		backing := strings.TrimSuffix(strings.TrimSpace(string(data)), " (deleted)")
		if strings.HasPrefix(backing, dir+"/") {
			loops["/dev/"+strings.Split(f, "/")[3]] = backing
		}
	}
	return loops, nil
}

func detachLoop(device string) error {
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0)
}

// processStart returns the start time of a process in clock ticks since boot, field
// 22 of /proc/PID/stat, which with the pid names a process for as long as the
// machine runs.
func processStart(pid int) (string, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	// The command's name, in parentheses, may itself contain anything.
	_, after, found := strings.Cut(string(data[strings.LastIndexByte(string(data), ')')+1:]), " ")
	fields := strings.Fields(after)
	if !found || len(fields) < 20 {
		return "", fmt.Errorf("/proc/%d/stat: unexpected form", pid)
	}
	if fields[0] == "Z" {
		return "", fmt.Errorf("process %d is dead", pid)
	}
	return fields[19], nil
}

func allPids() []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids
}

// markedProcesses returns the processes that carry the lab's folder in their
// environment.
func markedProcesses(dir string) []int {
	mark := envMark + dir
	var pids []int
	for _, pid := range allPids() {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if err != nil {
			continue
		}
		for v := range strings.SplitSeq(string(data), "\x00") {
			if v == mark {
				pids = append(pids, pid)
				break
			}
		}
	}
	return pids
}

// containerProcesses returns the processes in cgroups of the lab of that name.
func containerProcesses(name string) []int {
	mark := cgroupRoot + "/" + name + "/"
	var pids []int
	for _, pid := range allPids() {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if err == nil && strings.Contains(string(data), mark) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// ContainerIDs returns, for each process in a container of the lab, the container's
// id, in order.
func (l *Lab) ContainerIDs() []string {
	mark := cgroupRoot + "/" + l.name + "/"
	var ids []string
	for _, pid := range containerProcesses(l.name) {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		if err != nil {
			continue // ended meanwhile
		}
		if _, after, found := strings.Cut(string(data), mark); found {
			id, _, _ := strings.Cut(after, "\n")
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// killAll kills the processes and waits until they are gone, ten seconds at most.
func killAll(pids []int) {
	for _, pid := range pids {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	deadline := time.Now().Add(10 * time.Second)
	for _, pid := range pids {
		for time.Now().Before(deadline) {
			if _, err := processStart(pid); err != nil {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
}

func commandLine(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(strings.ReplaceAll(string(data), "\x00", " "))
}

// removeCgroups removes the empty cgroups of a lab in every hierarchy.
func removeCgroups(name string) {
	for _, pattern := range []string{"/sys/fs/cgroup" + cgroupRoot, "/sys/fs/cgroup/*" + cgroupRoot} {
		roots, _ := filepath.Glob(pattern)
		for _, root := range roots {
			containers, _ := filepath.Glob(filepath.Join(root, name, "*"))
			for _, c := range containers {
				_ = unix.Rmdir(c)
			}
			_ = unix.Rmdir(filepath.Join(root, name))
			_ = unix.Rmdir(root)
		}
	}
}

// Sync writes back the file system that labs are on. It is not sync(2), which waits
// for every file system of the machine, also for one whose server hangs.
func Sync() error {
	dir, err := os.Open(os.TempDir())
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return fmt.Errorf("sync the file system of %s: %w", dir.Name(), err)
	}
	return nil
}

// DropCaches writes back the labs' file system and drops the page cache, dentries and
// inodes of the whole machine, so that what runs next reads from the disk.
func DropCaches() error {
	if err := Sync(); err != nil {
		return err
	}
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3\n"), 0)
}

// poll calls f until it returns nil, ctx ends, or alive reports false.
func poll(ctx context.Context, every time.Duration, alive func() error, f func(context.Context) error) error {
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		if died := alive(); died != nil {
			return died
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (last: %w)", ctx.Err(), err)
		case <-time.After(every):
		}
	}
}

func tail(path string, maxBytes int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > maxBytes {
		_, _ = f.Seek(-maxBytes, io.SeekEnd)
	}
	data, _ := io.ReadAll(io.LimitReader(f, maxBytes))
	return string(data)
}
