#include "memory_limit.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <optional>
#include <sstream>
#include <string_view>
#include <vector>

namespace accumloss {
namespace cpu {
namespace {

constexpr uint64_t kNone = std::numeric_limits<uint64_t>::max();  // no limit
constexpr uint64_t kShare = 8;

// The names of the files of a version; a limit that a version does not have is null.
struct Files {
  const char* limits[2];
  const char* use;
  const char* inactive_file;  // the line of memory.stat, of the group and those below it
};

// memory.high kills nobody, but a process above it is slowed down until it is below.
constexpr Files kVersion1 = {{"memory.limit_in_bytes", nullptr}, "memory.usage_in_bytes", "total_inactive_file "};
constexpr Files kVersion2 = {{"memory.max", "memory.high"}, "memory.current", "inactive_file "};

struct Group {
  std::string folder;
  const Files* files;
};

// A mount of a hierarchy that accounts for memory.
struct Mount {
  std::string root, folder;  // root: the group that the folder is
  bool is_version2;
};

// What was found out once, under the mutex: mounts do not change, and the path of the groups seldom does.
struct Known {
  std::mutex mutex;
  std::string below;
  std::optional<std::vector<Mount>> mounts;
  std::string paths;  // /proc/self/cgroup, to which the groups belong
  std::vector<Group> groups;
};

Known& known() {
  static Known* const known = new Known;  // never destroyed: gradients may be freed after the static objects
  return *known;
}

// The whole file; nothing where it cannot be read.
std::optional<std::string> read(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return std::nullopt;
  std::string text;
  char buffer[4096];
  ssize_t bytes;
  while ((bytes = ::read(file, buffer, sizeof buffer)) > 0 || (bytes < 0 && errno == EINTR))
    if (bytes > 0) text.append(buffer, static_cast<size_t>(bytes));
  close(file);
  return bytes < 0 ? std::nullopt : std::make_optional(std::move(text));
}

// The number that a text begins with; nothing where it begins with none ("max").
std::optional<uint64_t> number(const char* text) {
  if (*text < '0' || *text > '9') return std::nullopt;
  return std::strtoull(text, nullptr, 10);  // beyond 64 bits: the largest, which is no limit
}

std::optional<uint64_t> read_number(const std::string& path) {
  const std::optional<std::string> text = read(path);
  return text ? number(text->c_str()) : std::nullopt;
}

uint64_t inactive_file(const Group& group) {
  const std::optional<std::string> text = read(group.folder + "/memory.stat");
  if (!text) return 0;
  const std::string name = group.files->inactive_file;
  const size_t at = text->rfind(name, 0) == 0 ? 0 : text->find('\n' + name);
  if (at == std::string::npos) return 0;
  return number(text->c_str() + at + (at != 0) + name.size()).value_or(0);
}

// limit - use of a group, at least where that is less than enough; kNone where its limit is no less than the machine.
// Its pages of files that were not used lately do not count as use: they are given up before anything is killed, and a
// process that has read its data set would be left with no room at all. (Kubernetes evicts by the same difference.)
// They stand in memory.stat, which takes far longer to read than the rest, and is left where there is enough without.
uint64_t room(const Group& group, uint64_t machine, uint64_t enough) {
  uint64_t limit = kNone;
  for (const char* name : group.files->limits)
    if (name != nullptr) limit = std::min(limit, read_number(group.folder + '/' + name).value_or(kNone));
  if (limit >= machine) return kNone;
  const std::optional<uint64_t> use = read_number(group.folder + '/' + group.files->use);
  if (!use) return 0;
  const uint64_t left = limit - std::min(limit, *use);
  if (left >= enough) return left;
  return limit - std::min(limit, *use - std::min(*use, inactive_file(group)));
}

// A path of mountinfo, where blanks are written \040.
std::string unescaped(std::string_view text) {
  std::string path;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\\' && i + 3 < text.size()) {
      path += static_cast<char>((text[i + 1] - '0') * 64 + (text[i + 2] - '0') * 8 + (text[i + 3] - '0'));
      i += 3;
    } else {
      path += text[i];
    }
  }
  return path;
}

bool has_word(const std::string& list, std::string_view word) {
  std::istringstream words(list);
  for (std::string found; std::getline(words, found, ',');)
    if (found == word) return true;
  return false;
}

// "36 35 98:0 /root /folder options [optional ...] - type source super_options"
std::vector<Mount> find_mounts(const std::string& below) {
  std::vector<Mount> mounts;
  std::istringstream lines(read(below + "/proc/self/mountinfo").value_or(""));
  for (std::string line; std::getline(lines, line);) {
    const size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    std::istringstream first(line.substr(0, dash)), second(line.substr(dash + 3));
    std::string skipped, root, folder, type, source, options;
    first >> skipped >> skipped >> skipped >> root >> folder;
    second >> type >> source >> options;
    const bool is_version2 = type == "cgroup2";
    if (is_version2 || (type == "cgroup" && has_word(options, "memory")))
      mounts.push_back({unescaped(root), below + unescaped(folder), is_version2});
  }
  return mounts;
}

bool is_within(const std::string& path, const std::string& root) {
  return root == "/" || path == root || (path.rfind(root, 0) == 0 && path[root.size()] == '/');
}

// The group at a path of a hierarchy and its ancestors, as far as a mount shows them. In a container whose mount does
// not show the path, the folder of the mount alone: the group of the container.
void append_groups(const std::vector<Mount>& mounts, const std::string& path, bool is_version2,
                   std::vector<Group>* groups) {
  const Files* const files = is_version2 ? &kVersion2 : &kVersion1;
  const Mount* best = nullptr;
  const Mount* any = nullptr;
  for (const Mount& mount : mounts) {
    if (mount.is_version2 != is_version2) continue;
    any = &mount;
    if (is_within(path, mount.root) && (best == nullptr || mount.root.size() < best->root.size())) best = &mount;
  }
  if (any == nullptr) return;
  if (best == nullptr) return groups->push_back({any->folder, files});
  std::string rest = best->root == "/" ? path : path.substr(best->root.size());
  while (!rest.empty() && rest != "/") {
    groups->push_back({best->folder + rest, files});
    rest.resize(rest.rfind('/'));
  }
  groups->push_back({best->folder, files});
}

// Lines "4:cpu,memory:/path" of version 1, "0::/path" of version 2; a machine may have both.
std::vector<Group> find_groups(const std::vector<Mount>& mounts, const std::string& paths) {
  std::vector<Group> groups;
  std::istringstream lines(paths);
  for (std::string line; std::getline(lines, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
    if (path.empty() || path[0] != '/') continue;
    const bool is_version2 = controllers.empty();
    if (is_version2 || has_word(controllers, "memory")) append_groups(mounts, path, is_version2, &groups);
  }
  return groups;
}

const std::vector<Group>& groups_of_process(Known& known) {
  if (!known.mounts) known.mounts = find_mounts(known.below);
  std::string paths = read(known.below + "/proc/self/cgroup").value_or("");
  if (paths != known.paths) {
    known.groups = find_groups(*known.mounts, paths);
    known.paths = std::move(paths);
  }
  return known.groups;
}

uint64_t bytes_of_machine() {
  return static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

size_t most_kept(size_t wanted) noexcept {
  try {
    Known& all = known();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const uint64_t machine = bytes_of_machine(), enough = wanted > kNone / kShare ? kNone : wanted * kShare;
    uint64_t bytes = machine;
    for (const Group& group : groups_of_process(all)) bytes = std::min(bytes, room(group, machine, enough));
    return static_cast<size_t>(bytes / kShare);
  } catch (...) {  // no memory for the names of the files: no time to keep any
    return 0;
  }
}

void read_limits_below(const std::string& folder) {
  Known& all = known();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.below = folder;
  all.mounts.reset();
  all.paths.clear();
  all.groups.clear();
}

}  // namespace cpu
}  // namespace accumloss
