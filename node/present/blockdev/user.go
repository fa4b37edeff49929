package blockdev

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// findUser names somebody beside this process who uses the block device, or returns "".
// It runs in a child, and asks nothing that another file system would have to answer.
func findUser(path string, rdev uint64) (string, error) {
	number := fmt.Sprintf("%d:%d", unix.Major(rdev), unix.Minor(rdev))
	if holders, _ := os.ReadDir("/sys/dev/block/" + number + "/holders"); len(holders) > 0 {
		return "device " + holders[0].Name(), nil
	}
	if raw, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		if target := mountOf(string(raw), number, path); target != "" {
			return "mount on " + target, nil
		}
	}
	if loop := loopOn(path); loop != "" {
		return loop, nil
	}
	processes, err := os.ReadDir("/proc")
	if err != nil {
		return "", err
	}
	self := strconv.Itoa(os.Getpid())
	for _, p := range processes {
		if name := p.Name(); name[0] >= '0' && name[0] <= '9' && name != self && hasOpen("/proc/"+name, path, rdev) {
			return "process " + name, nil
		}
	}
	return "", nil
}

// mountOf finds a mount of the device number, or of the path as the source, in the text
// of /proc/PID/mountinfo (proc_pid_mountinfo(5)).
func mountOf(mountinfo, number, path string) string {
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(line, " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 6 || len(right) < 2 {
			continue
		}
		if left[2] == number || right[1] == path {
			return left[4]
		}
	}
	return ""
}

// loopOn names a loop device on the file at path.
func loopOn(path string) string {
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, f := range files {
		if raw, err := os.ReadFile(f); err == nil && strings.TrimSuffix(string(raw), "\n") == path {
			return "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(f)))
		}
	}
	return ""
}

// hasOpen tells whether a process has the device open or mapped.
func hasOpen(process, path string, rdev uint64) bool {
	fds, _ := os.ReadDir(process + "/fd") // it may have ended
	for _, fd := range fds {
		name := process + "/fd/" + fd.Name()
		// What has no path is no device node.
		if to, err := os.Readlink(name); err != nil || !strings.HasPrefix(to, "/") {
			continue
		}
		// DONT_SYNC: a network or FUSE file system is not asked.
		var st unix.Statx_t
		if unix.Statx(unix.AT_FDCWD, name, unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st) == nil &&
			st.Mode&unix.S_IFMT == unix.S_IFBLK && unix.Mkdev(st.Rdev_major, st.Rdev_minor) == rdev {
			return true
		}
	}
	maps, err := os.ReadFile(process + "/maps")
	return err == nil && strings.Contains(string(maps), " "+path+"\n")
}
